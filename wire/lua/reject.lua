-- End requests that never reach a group: invalid, expired in the queue, undecodable.
-- ARGV for each request: id, fence, priority, entry, state, result,
--       dead ('' or the reason for which it is dead-lettered)
-- Returns how many were ended; one that is no longer queued under that fence and entry is left
-- alone.

local ended = 0
for i = 1, #ARGV, 7 do
  local id, fence, priority, entry, state, result, dead = unpack(ARGV, i, i + 6)
  local record = redis.call('HMGET', request_key(id), 'state', 'fence', 'entry')
  local is_waiting = record[1] == 'queued' and record[2] == fence and record[3] == entry
  if is_waiting then
    if dead ~= '' then
      finish_dead(id, dead, result)
    else
      finish(id, state, result, 'queue')
    end
    ended = ended + 1
  end
  remove_from_intake(priority, entry)
end
return ended
