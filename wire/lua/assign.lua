-- Hand a batch to a worker group, within its credits, under new fencing tokens.
-- ARGV: group, epoch, credits, batch_id, exclusive (0|1),
--       then for each request: id, fence (as the scheduler read it), new_fence, priority, entry,
--       assignment (which carries the new fence)
-- A request that is no longer queued under its fence and entry (cancelled, or taken by another
-- scheduler; or lost by the server and submitted anew, when its fence begins anew) is left out.
-- An exclusive batch goes only to an empty group, which takes nothing beside it; asking for it
-- keeps the group from being filled again for RESERVED_MS.
-- Returns 'gone' (no such live group), 'full' (no room; nothing was assigned), or the list of the
-- ids that were assigned.

local RESERVED_MS = 3000

local group, epoch, credits, batch_id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local exclusive = ARGV[5] == '1'
if not is_alive(group, epoch) then
  return 'gone'
end

local owned, alone = group_key(group, epoch, 'owned'), group_key(group, epoch, 'exclusive')
local num_owned = redis.call('SCARD', owned)
if exclusive and num_owned > 0 then
  if redis.call('GET', alone) ~= 'running' then
    redis.call('SET', alone, 'wanted', 'PX', RESERVED_MS)
  end
  return 'full'
end
if not exclusive then
  local state = redis.call('GET', alone)
  if state == 'wanted' or (state == 'running' and num_owned > 0) then
    return 'full'
  end
end
if num_owned + (#ARGV - 5) / 6 > credits then
  return 'full'
end

local fields = {'batch_id', batch_id}
local assigned = {}
for i = 6, #ARGV, 6 do
  local id, fence, new_fence, priority, entry, assignment = unpack(ARGV, i, i + 5)
  local record = redis.call('HMGET', request_key(id), 'state', 'fence', 'entry')
  local is_waiting = record[1] == 'queued' and record[2] == fence and record[3] == entry
  if is_waiting and tonumber(new_fence) > tonumber(fence) then
    redis.call('HSET', request_key(id), 'state', 'assigned', 'fence', new_fence,
      'owner', group .. ':' .. epoch)
    redis.call('SADD', owned, id)
    remove_from_intake(priority, entry)
    fields[#fields + 1] = 'assignment:' .. new_fence .. ':' .. id
    fields[#fields + 1] = assignment
    assigned[#assigned + 1] = id
  elseif record[3] ~= entry then
    -- Whoever took it from the queue took the entry too, unless there is no such request any more.
    remove_from_intake(priority, entry)
  end
end
if #assigned > 0 then
  redis.call('PEXPIRE', owned, LIVE_TTL_MS)
  append(group_key(group, epoch, 'inbox'), LIVE_TTL_MS, unpack(fields))
  if exclusive then
    redis.call('SET', alone, 'running', 'PX', LIVE_TTL_MS)
  else
    redis.call('DEL', alone)
  end
end
return assigned
