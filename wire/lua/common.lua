-- Put in front of every script. KEYS[1] is the partition's prefix; every key that a script
-- touches begins with it, so that they share one hash tag (one cluster slot).
-- Names and times to live: wire/keys.py.

local PREFIX = KEYS[1]
local LIVE_TTL_MS = 7 * 24 * 3600 * 1000
local DISPATCHERS = 'schedulers'
local PRIORITIES = {'interactive', 'standard', 'batch'}
local MAX_DEAD_LETTERS = 10000
local DECLARED_DEAD = 0 -- in place of the time at which a group's lease ends
local CACHE_TTL_MS = 60 * 1000

local function request_key(id) return PREFIX .. ':request:' .. id end
local function journal_key(id) return PREFIX .. ':journal:' .. id end
local function results_key(name) return PREFIX .. ':results:' .. name end
local function intake_key(priority) return PREFIX .. ':intake:' .. priority end
local function delayed_key() return PREFIX .. ':delayed' end
local function dead_letters_key() return PREFIX .. ':dead_letters' end
local function dead_letter_key(id) return PREFIX .. ':dead:' .. id end
local function groups_key() return PREFIX .. ':groups' end
local function group_key(group, epoch, what)
  return PREFIX .. ':group:' .. group .. ':' .. epoch .. ':' .. what
end
local function epoch_key(group) return PREFIX .. ':epoch:' .. group end

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

-- Append to a stream that others append to as well: it lives as long as the longest of them needs.
local function append_shared(key, ttl_ms, ...)
  local left_ms = redis.call('PTTL', key)
  append(key, math.max(left_ms, ttl_ms), ...)
end

local function enqueue(id, priority)
  local entry = append(intake_key(priority), LIVE_TTL_MS, 'request_id', id)
  redis.call('HSET', request_key(id), 'state', 'queued', 'entry', entry, 'owner', '')
end

local function remove_from_intake(priority, entry)
  redis.call('XACK', intake_key(priority), DISPATCHERS, entry)
  redis.call('XDEL', intake_key(priority), entry)
end

-- How many more requests may be accepted.
local function room_in_intake(max_queued)
  local room = max_queued - redis.call('ZCARD', delayed_key())
  for _, priority in ipairs(PRIORITIES) do
    room = room - redis.call('XLEN', intake_key(priority))
  end
  return room
end

-- A new record, queued. `timeout_ms` is '' for none.
local function accept(id, priority, stream, timeout_ms, message, reply_to, result_ttl_ms)
  local key, now = request_key(id), now_ms()
  redis.call('HSET', key, 'request', message, 'priority', priority, 'stream', stream,
    'reply_to', reply_to, 'result_ttl_ms', result_ttl_ms, 'fence', 0, 'num_crashes', 0,
    'num_errors', 0, 'submitted_ms', now)
  if timeout_ms ~= '' then
    redis.call('HSET', key, 'deadline_ms', now + tonumber(timeout_ms))
  end
  redis.call('PEXPIRE', key, LIVE_TTL_MS)
  enqueue(id, priority)
end

-- Whether the group's lease lasts. Its requests are safe until it is declared dead (reclaim.lua).
local function is_alive(group, epoch)
  local lease = redis.call('ZSCORE', groups_key(), group .. ':' .. epoch)
  return lease and tonumber(lease) > now_ms()
end

-- What the directory knows of a group's cache goes at once, however much it is: the server frees the
-- memory of what is unlinked in a thread of its own.
local function forget_cache(group, epoch)
  redis.call('UNLINK', group_key(group, epoch, 'cache'), group_key(group, epoch, 'cache:device'),
    group_key(group, epoch, 'cache:host'))
end

-- Its entries live as long as somebody says that the group does.
local function renew_cache(group, epoch)
  for _, what in ipairs({'cache', 'cache:device', 'cache:host'}) do
    redis.call('PEXPIRE', group_key(group, epoch, what), CACHE_TTL_MS)
  end
end

-- The one way to a terminal state: the result is stored once, the results stream is told, the
-- journal ends. The caller has checked that the request was not terminal before. `by` is 'group'
-- where the result has all that was generated; else the journal stays, as it alone has it.
local function finish(id, state, result, by)
  local key = request_key(id)
  local record = redis.call('HMGET', key, 'reply_to', 'stream', 'result_ttl_ms')
  local ttl_ms = tonumber(record[3])
  redis.call('HSET', key, 'state', state, 'result', result, 'finished_ms', now_ms())
  redis.call('HDEL', key, 'request', 'entry', 'owner', 'cancelled', 'error')
  redis.call('PEXPIRE', key, ttl_ms)
  if by == 'group' and record[2] ~= '1' then
    -- Trimmed, not deleted: ids go on rising, so a reader in the middle of it sees the end.
    redis.call('XTRIM', journal_key(id), 'MAXLEN', 0)
  end
  append(journal_key(id), ttl_ms, 'state', state)
  append_shared(results_key(record[1]), ttl_ms, 'request_id', id, 'state', state)
end

-- End a request as failed, and keep what it takes to look into it and to submit it once more.
local function finish_dead(id, reason, result)
  local key, letter, now = request_key(id), dead_letter_key(id), now_ms()
  redis.call('DEL', letter)
  redis.call('HSET', letter, 'reason', reason, 'result', result, 'died_ms', now)
  for _, field in ipairs({'request', 'priority', 'stream', 'reply_to', 'result_ttl_ms',
      'num_crashes', 'num_errors', 'num_journaled', 'submitted_ms', 'deadline_ms'}) do
    local value = redis.call('HGET', key, field)
    if value then
      redis.call('HSET', letter, field, value)
    end
  end
  redis.call('PEXPIRE', letter, LIVE_TTL_MS)
  redis.call('ZADD', dead_letters_key(), now, id)
  redis.call('PEXPIRE', dead_letters_key(), LIVE_TTL_MS)
  local surplus = redis.call('ZCARD', dead_letters_key()) - MAX_DEAD_LETTERS
  if surplus > 0 then
    local oldest = redis.call('ZPOPMIN', dead_letters_key(), surplus)
    for i = 1, #oldest, 2 do
      redis.call('UNLINK', dead_letter_key(oldest[i]))
    end
  end
  finish(id, 'failed', result, 'queue')
end

-- Take a request from a group that serves it no more. Returns its priority, with which the caller
-- may queue it again; false when the group did not hold it, or it was to be cancelled and has ended.
local function take_back(id, group, epoch)
  local record = redis.call('HMGET', request_key(id), 'state', 'owner', 'priority', 'cancelled')
  if record[1] ~= 'assigned' or record[2] ~= group .. ':' .. epoch then
    return false
  end
  redis.call('HINCRBY', request_key(id), 'fence', 1)
  if record[4] then
    finish(id, 'cancelled', record[4], 'queue')
    return false
  end
  return record[3]
end
