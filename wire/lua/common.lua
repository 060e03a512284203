-- Put in front of every script. KEYS[1] is the partition's prefix; every key that a script
-- touches begins with it, so that they share one hash tag (one cluster slot).
-- Names and times to live: wire/keys.py.

local PREFIX = KEYS[1]
local LIVE_TTL_MS = 7 * 24 * 3600 * 1000
local DISPATCHERS = 'schedulers'

local function request_key(id) return PREFIX .. ':request:' .. id end
local function journal_key(id) return PREFIX .. ':journal:' .. id end
local function results_key(name) return PREFIX .. ':results:' .. name end
local function intake_key(priority) return PREFIX .. ':intake:' .. priority end
local function groups_key() return PREFIX .. ':groups' end
local function group_key(group, epoch, what)
  return PREFIX .. ':group:' .. group .. ':' .. epoch .. ':' .. what
end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Append to a stream and push its time to live out again.
local function append(key, ttl_ms, ...)
  local id = redis.call('XADD', key, '*', ...)
  redis.call('PEXPIRE', key, ttl_ms)
  return id
end

local function enqueue(id, priority)
  local entry = append(intake_key(priority), LIVE_TTL_MS, 'request_id', id)
  redis.call('HSET', request_key(id), 'state', 'queued', 'entry', entry, 'owner', '')
end

local function remove_from_intake(priority, entry)
  redis.call('XACK', intake_key(priority), DISPATCHERS, entry)
  redis.call('XDEL', intake_key(priority), entry)
end

-- The one way to a terminal state: the result is stored once, the results stream is told, the
-- journal ends. The caller has checked that the request was not terminal before.
local function finish(id, state, result)
  local key = request_key(id)
  local record = redis.call('HMGET', key, 'reply_to', 'stream', 'result_ttl_ms')
  local ttl_ms = tonumber(record[3])
  redis.call('HSET', key, 'state', state, 'result', result, 'finished_ms', now_ms())
  redis.call('HDEL', key, 'request', 'entry', 'owner', 'cancelled')
  redis.call('PEXPIRE', key, ttl_ms)
  if record[2] ~= '1' then
    -- Trimmed, not deleted: ids go on rising, so a reader in the middle of it sees the end.
    redis.call('XTRIM', journal_key(id), 'MAXLEN', 0)
  end
  append(journal_key(id), ttl_ms, 'state', state)
  append(results_key(record[1]), ttl_ms, 'request_id', id, 'state', state)
end
