-- Accept requests: at most once each, and only while there is room.
-- ARGV: max_queued, max_unread, result_ttl_ms, reply_to,
--       then for each request: id, priority, stream (0|1), timeout_ms ('' for none), message
-- Returns for each: 'new', 'known' (this id was accepted before) or 'full'.

local max_queued, max_unread = tonumber(ARGV[1]), tonumber(ARGV[2])
local result_ttl_ms, reply_to = ARGV[3], ARGV[4]

-- Results that nobody reads hold the intake back too, or they would pile up without bound.
local room = math.min(
  room_in_intake(max_queued), max_unread - redis.call('XLEN', results_key(reply_to)))

local outcomes = {}
for i = 5, #ARGV, 5 do
  local id, priority, stream, timeout_ms, message = unpack(ARGV, i, i + 4)
  if redis.call('EXISTS', request_key(id)) == 1 then
    outcomes[#outcomes + 1] = 'known'
  elseif room <= 0 then
    outcomes[#outcomes + 1] = 'full'
  else
    accept(id, priority, stream, timeout_ms, message, reply_to, result_ttl_ms)
    room = room - 1
    outcomes[#outcomes + 1] = 'new'
  end
end
return outcomes
