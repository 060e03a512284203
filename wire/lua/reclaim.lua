-- Put the requests of a group that is dead, or is leaving, back into the queue.
-- ARGV: group, epoch, leaving (0|1), max_attempts, limit, result (for those out of attempts)
-- A crash costs each request one attempt; an orderly leave costs none. One whose cancellation was
-- on its way to the group ends here.
-- Returns how many requests were taken from it in this call (call again while it is `limit`),
-- and how many of those failed for good; {-1, 0} when the group is alive after all.

local group, epoch, leaving = ARGV[1], ARGV[2], ARGV[3] == '1'
local max_attempts, limit, result = tonumber(ARGV[4]), tonumber(ARGV[5]), ARGV[6]
local status, owned = group_key(group, epoch, 'status'), group_key(group, epoch, 'owned')
if leaving then
  redis.call('DEL', status)
elseif redis.call('EXISTS', status) == 1 then
  return {-1, 0}
end

local taken, failed = 0, 0
for _, id in ipairs(redis.call('SPOP', owned, limit)) do
  taken = taken + 1
  local key = request_key(id)
  local record = redis.call('HMGET', key, 'state', 'owner', 'priority', 'attempts', 'cancelled')
  if record[1] == 'assigned' and record[2] == group .. ':' .. epoch then
    local attempts = tonumber(record[4]) + (leaving and 0 or 1)
    redis.call('HSET', key, 'attempts', attempts)
    redis.call('HINCRBY', key, 'fence', 1)
    if record[5] then
      finish(id, 'cancelled', record[5])
    elseif not leaving and attempts >= max_attempts then
      finish(id, 'failed', result)
      failed = failed + 1
    else
      enqueue(id, record[3])
    end
  end
end
if taken < limit then
  redis.call('SREM', groups_key(), group .. ':' .. epoch)
  redis.call('UNLINK', owned, group_key(group, epoch, 'inbox'))
end
return {taken, failed}
