-- The fleet at a glance. Returns the server's time in ms, then for each group that was ever alive
-- and not yet buried: 'group:epoch', its status ('' when its heartbeat stopped), how many
-- requests it holds.

redis.call('PEXPIRE', PREFIX .. ':salt', LIVE_TTL_MS)
local reply = {now_ms()}
for _, member in ipairs(redis.call('SMEMBERS', groups_key())) do
  local group, epoch = string.match(member, '^(.*):(%d+)$')
  reply[#reply + 1] = member
  reply[#reply + 1] = redis.call('GET', group_key(group, epoch, 'status')) or ''
  reply[#reply + 1] = redis.call('SCARD', group_key(group, epoch, 'owned'))
end
return reply
