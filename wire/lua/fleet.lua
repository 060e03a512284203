-- The fleet at a glance. Returns the server's time in ms, then for each group that was ever alive
-- and not yet declared dead: 'group:epoch', when its lease ends (ms), its status ('' if it has none
-- any more), how many requests it holds, and whether they have it for themselves (0|1).

redis.call('PEXPIRE', PREFIX .. ':salt', LIVE_TTL_MS)
local reply = {now_ms()}
local members = redis.call('ZRANGE', groups_key(), 0, -1, 'WITHSCORES')
for i = 1, #members, 2 do
  local group, epoch = string.match(members[i], '^(.*):(%d+)$')
  reply[#reply + 1] = members[i]
  reply[#reply + 1] = tonumber(members[i + 1])
  reply[#reply + 1] = redis.call('GET', group_key(group, epoch, 'status')) or ''
  local num_owned = redis.call('SCARD', group_key(group, epoch, 'owned'))
  local alone = redis.call('GET', group_key(group, epoch, 'exclusive'))
  reply[#reply + 1] = num_owned
  reply[#reply + 1] = (alone == 'wanted' or (alone == 'running' and num_owned > 0)) and 1 or 0
end
return reply
