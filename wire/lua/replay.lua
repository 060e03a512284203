-- Make a new request of a dead letter, which is then gone. ARGV: id, new_id, message, max_queued
-- Its deadline, if it had one, counts anew. Returns 'new', 'gone' (there is no such letter, or it
-- was replayed just now), or, and the letter stays, 'known' (the new id is taken) or 'full' (too
-- much is queued).

local id, new_id, message, max_queued = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local letter = redis.call('HMGET', dead_letter_key(id),
  'priority', 'stream', 'reply_to', 'result_ttl_ms', 'deadline_ms', 'submitted_ms')
if not letter[1] then
  return 'gone'
end
if redis.call('EXISTS', request_key(new_id)) == 1 then
  return 'known'
end
if room_in_intake(max_queued) <= 0 then
  return 'full'
end
redis.call('ZREM', dead_letters_key(), id)
redis.call('UNLINK', dead_letter_key(id))
local timeout_ms = letter[5] and letter[5] - letter[6] or ''
accept(new_id, letter[1], letter[2], timeout_ms, message, letter[3], letter[4])
return 'new'
