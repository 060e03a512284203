-- Accept requests: at most once each, and only while there is room.
-- ARGV: max_queued, max_unread, result_ttl_ms, reply_to,
--       then for each request: id, priority, stream (0|1), timeout_ms ('' for none), message
-- Returns for each: 'new', 'known' (this id was accepted before) or 'full'.

local max_queued, max_unread = tonumber(ARGV[1]), tonumber(ARGV[2])
local result_ttl_ms, reply_to = ARGV[3], ARGV[4]

local room = max_queued
for _, priority in ipairs({'interactive', 'standard', 'batch'}) do
  room = room - redis.call('XLEN', intake_key(priority))
end
-- Results that nobody reads hold the intake back too, or they would pile up without bound.
room = math.min(room, max_unread - redis.call('XLEN', results_key(reply_to)))

local now = now_ms()
local outcomes = {}
for i = 5, #ARGV, 5 do
  local id, priority, stream, timeout_ms, message = unpack(ARGV, i, i + 4)
  local key = request_key(id)
  if redis.call('EXISTS', key) == 1 then
    outcomes[#outcomes + 1] = 'known'
  elseif room <= 0 then
    outcomes[#outcomes + 1] = 'full'
  else
    redis.call('HSET', key, 'request', message, 'priority', priority, 'stream', stream,
      'reply_to', reply_to, 'result_ttl_ms', result_ttl_ms, 'fence', 0, 'attempts', 0,
      'submitted_ms', now)
    if timeout_ms ~= '' then
      redis.call('HSET', key, 'deadline_ms', now + tonumber(timeout_ms))
    end
    redis.call('PEXPIRE', key, LIVE_TTL_MS)
    enqueue(id, priority)
    room = room - 1
    outcomes[#outcomes + 1] = 'new'
  end
end
return outcomes
