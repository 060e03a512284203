-- Cancel a request. ARGV: id, result (the message to store if no group has it)
-- Returns the state that it has now ('cancelled' at once if it was queued or delayed), 'requested'
-- when its group was told to stop it, or 'unknown'. The wish is noted in the record too: a group
-- that dies with its mail unread must not make the request run again.

local id, result = ARGV[1], ARGV[2]
local record = redis.call('HMGET', request_key(id), 'state', 'priority', 'entry', 'owner')
local state = record[1]
if not state then
  return 'unknown'
elseif state == 'queued' or state == 'delayed' then
  if state == 'queued' then
    remove_from_intake(record[2], record[3])
  else
    redis.call('ZREM', delayed_key(), id)
  end
  finish(id, 'cancelled', result, 'queue')
  return 'cancelled'
elseif state == 'assigned' then
  redis.call('HSET', request_key(id), 'cancelled', result)
  local group, epoch = string.match(record[4], '^(.*):(%d+)$')
  append(group_key(group, epoch, 'inbox'), LIVE_TTL_MS, 'cancel', id)
  return 'requested'
end
return state
