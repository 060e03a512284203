-- Hand a batch to a worker group, within its credits; bump each request's fencing token.
-- ARGV: group, epoch, credits, batch_id,
--       then for each request: id, fence (as the scheduler read it), priority, entry, assignment
-- The assignment carries fence + 1. A request that is no longer queued under that fence
-- (cancelled, or taken by another scheduler) is left out.
-- Returns 'gone' (no such live group), 'full' (not enough credits; nothing was assigned), or
-- the list of the ids that were assigned.

local group, epoch, credits, batch_id = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
local owned = group_key(group, epoch, 'owned')
if redis.call('EXISTS', group_key(group, epoch, 'status')) == 0 then
  return 'gone'
end
if redis.call('SCARD', owned) + (#ARGV - 4) / 5 > credits then
  return 'full'
end

local fields = {'batch_id', batch_id}
local assigned = {}
for i = 5, #ARGV, 5 do
  local id, fence, priority, entry, assignment = unpack(ARGV, i, i + 4)
  local record = redis.call('HMGET', request_key(id), 'state', 'fence')
  if record[1] == 'queued' and record[2] == fence then
    redis.call('HSET', request_key(id), 'state', 'assigned', 'fence', fence + 1,
      'owner', group .. ':' .. epoch)
    redis.call('SADD', owned, id)
    remove_from_intake(priority, entry)
    fields[#fields + 1] = 'assignment:' .. (fence + 1) .. ':' .. id
    fields[#fields + 1] = assignment
    assigned[#assigned + 1] = id
  end
end
if #assigned > 0 then
  redis.call('PEXPIRE', owned, LIVE_TTL_MS)
  append(group_key(group, epoch, 'inbox'), LIVE_TTL_MS, unpack(fields))
end
return assigned
