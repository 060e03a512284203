-- End requests that never reach a group: invalid, expired in the queue, undecodable.
-- ARGV for each request: id, fence, priority, entry, state, result
-- Returns how many were ended; one that is no longer queued under that fence is left alone.

local ended = 0
for i = 1, #ARGV, 6 do
  local id, fence, priority, entry, state, result = unpack(ARGV, i, i + 5)
  local record = redis.call('HMGET', request_key(id), 'state', 'fence')
  if record[1] == 'queued' and record[2] == fence then
    finish(id, state, result)
    ended = ended + 1
  end
  remove_from_intake(priority, entry)
end
return ended
