-- Keep a group alive. ARGV: group, epoch, timeout_ms, first (0|1), model name, status
-- A beat that comes late renews the lease all the same, as long as nobody has declared the group
-- dead (reclaim.lua).
-- Returns the server's time in ms, or 0 when it was declared dead: its requests are somebody
-- else's, and it must register again.

local group, epoch, timeout_ms, first, model, status = unpack(ARGV)
local member, now = group .. ':' .. epoch, now_ms()
local lease = redis.call('ZSCORE', groups_key(), member)
if tonumber(lease or -1) == DECLARED_DEAD or (first == '0' and not lease) then
  return 0
end
redis.call('ZADD', groups_key(), now + tonumber(timeout_ms), member)
redis.call('SET', group_key(group, epoch, 'status'), status, 'PX', LIVE_TTL_MS)
redis.call('PEXPIRE', groups_key(), LIVE_TTL_MS)
redis.call('PEXPIRE', PREFIX .. ':model:' .. model, LIVE_TTL_MS)
redis.call('PEXPIRE', epoch_key(group), LIVE_TTL_MS)
renew_cache(group, epoch)
return now
