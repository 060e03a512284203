-- Bring a group and the queue to one opinion of what it holds, after the server was away: one that
-- has lost its last moments may hold the group to requests that it has finished in them, and miss
-- tokens that it has journaled.
-- ARGV: group, epoch, position (the last inbox entry that the group has read), then the ids of the
-- requests that the group knows of.
-- What it does not know of goes back into the queue, and nothing is counted.
-- Returns -1 if there is mail that the group has yet to read, else how many went back, and for each
-- request that it holds: id, how many of its tokens are in the journal.

local group, epoch, position = ARGV[1], ARGV[2], ARGV[3]
local inbox, owned = group_key(group, epoch, 'inbox'), group_key(group, epoch, 'owned')
if #redis.call('XRANGE', inbox, '(' .. position, '+', 'COUNT', 1) > 0 then
  return {-1}
end
local known = {}
for i = 4, #ARGV do
  known[ARGV[i]] = true
end
local reply = {0}
for _, id in ipairs(redis.call('SMEMBERS', owned)) do
  if known[id] then
    reply[#reply + 1] = id
    reply[#reply + 1] = tonumber(redis.call('HGET', request_key(id), 'num_journaled') or 0)
  else
    redis.call('SREM', owned, id)
    local priority = take_back(id, group, epoch)
    if priority then
      enqueue(id, priority)
      reply[1] = reply[1] + 1
    end
  end
end
return reply
