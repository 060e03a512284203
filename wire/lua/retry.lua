-- See to the requests whose last attempt ended in an error.
-- ARGV: max_errors, delay_ms, max_delay_ms, limit
-- One with an `error` has yet to be judged: out of its budget it fails and is dead-lettered, else
-- it waits, twice as long after each error (but not past its deadline: then it is due to expire).
-- One without has waited, and is queued again.
-- Returns how many were queued again and how many failed, of at most `limit`.

local max_errors, delay_ms = tonumber(ARGV[1]), tonumber(ARGV[2])
local max_delay_ms, limit = tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local num_queued, num_failed = 0, 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', delayed_key(), 0, now, 'LIMIT', 0, limit)) do
  local key = request_key(id)
  local record = redis.call(
    'HMGET', key, 'state', 'priority', 'num_errors', 'error', 'deadline_ms')
  local num_errors = tonumber(record[3] or 0)
  if record[1] ~= 'delayed' then
    redis.call('ZREM', delayed_key(), id)
  elseif not record[4] then
    redis.call('ZREM', delayed_key(), id)
    enqueue(id, record[2])
    num_queued = num_queued + 1
  elseif num_errors >= max_errors then
    redis.call('ZREM', delayed_key(), id)
    finish_dead(id, 'retries_exhausted', record[4])
    num_failed = num_failed + 1
  else
    local due = now + math.min(delay_ms * 2 ^ (num_errors - 1), max_delay_ms)
    redis.call('HDEL', key, 'error')
    redis.call('ZADD', delayed_key(), math.min(due, tonumber(record[5] or due)), id)
  end
end
redis.call('PEXPIRE', delayed_key(), LIVE_TTL_MS)
return {num_queued, num_failed}
