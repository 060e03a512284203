-- Keep a group alive. ARGV: group, epoch, timeout_ms, first (0|1), model name, status
-- Returns the server's time in ms, or 0 when the group was declared dead in the meantime: its
-- requests are somebody else's, and it must register again.

local group, epoch, timeout_ms, first, model, status = unpack(ARGV)
local key = group_key(group, epoch, 'status')
if first == '0' and redis.call('EXISTS', key) == 0 then
  return 0
end
redis.call('SET', key, status, 'PX', timeout_ms)
redis.call('SADD', groups_key(), group .. ':' .. epoch)
redis.call('PEXPIRE', groups_key(), LIVE_TTL_MS)
redis.call('PEXPIRE', PREFIX .. ':model:' .. model, LIVE_TTL_MS)
-- If the counter expired, the group's next life would get the epoch of an earlier one.
redis.call('PEXPIRE', PREFIX .. ':epoch:' .. group, LIVE_TTL_MS)
return now_ms()
