-- Put the requests of a group that is dead, or is leaving, back into the queue.
-- ARGV: group, epoch, how, max_crashes, limit, result (for those that fail)
-- `how`: 'leaving' (an orderly leave, which counts for nothing), 'crashed' (the group says so of
-- itself), 'lapsed' (a scheduler says so; heeded only if the lease is over). From here on the group
-- is dead: its heartbeats and commits are refused, and the directory knows nothing of its cache.
-- One whose cancellation was on its way to the group ends here. A crash counts against each
-- request, but which of them caused it is known only where it was alone: only then may it fail.
-- Returns how many requests were taken from it in this call (call again while it is `limit`),
-- and how many of those failed for good; {-1, 0} when the group is alive after all.

local group, epoch, how = ARGV[1], ARGV[2], ARGV[3]
local max_crashes, limit, result = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local owned = group_key(group, epoch, 'owned')
if how == 'lapsed' and is_alive(group, epoch) then
  return {-1, 0}
end
-- It stays in sight until all is taken from it, or its requests could be forgotten halfway.
redis.call('ZADD', groups_key(), 'XX', DECLARED_DEAD, group .. ':' .. epoch)
forget_cache(group, epoch)

-- How many it held when it died: the later calls find fewer.
local held = group_key(group, epoch, 'held')
redis.call('SET', held, redis.call('SCARD', owned), 'NX', 'PX', LIVE_TTL_MS)
local num_neighbours = redis.call('GET', held) - 1

local taken, failed = 0, 0
for _, id in ipairs(redis.call('SPOP', owned, limit)) do
  taken = taken + 1
  local priority, num_crashes = take_back(id, group, epoch), 0
  if priority and how ~= 'leaving' then
    num_crashes = redis.call('HINCRBY', request_key(id), 'num_crashes', 1)
    redis.call('HSET', request_key(id), 'num_neighbours', num_neighbours)
  end
  if priority and num_crashes >= max_crashes and num_neighbours == 0 then
    finish_dead(id, 'worker_lost', result)
    failed = failed + 1
  elseif priority then
    enqueue(id, priority)
  end
end
if taken < limit then
  redis.call('ZREM', groups_key(), group .. ':' .. epoch)
  for _, what in ipairs({'owned', 'held', 'inbox', 'status', 'exclusive'}) do
    redis.call('UNLINK', group_key(group, epoch, what))
  end
end
return {taken, failed}
