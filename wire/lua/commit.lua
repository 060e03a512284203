-- Write what a group has done: tokens into journals, terminal results; one call for all of it.
-- ARGV: group, epoch, then for each request: id, fence, chunk ('' for none),
--       state ('' while it goes on), result, offset, num_tokens
-- A chunk of `num_tokens` is journaled only if it begins at `offset`, where the journal ends: one
-- that is sent again, because the reply was lost, changes nothing.
-- Returns the ids that the group does not hold (any more) under that fence: for those nothing
-- was changed, and the group must stop them.

local group, epoch = ARGV[1], ARGV[2]
local owned = group_key(group, epoch, 'owned')
local stale = {}
for i = 3, #ARGV, 7 do
  local id, fence, chunk, state, result, offset, num_tokens = unpack(ARGV, i, i + 6)
  local record = redis.call('HMGET', request_key(id), 'state', 'fence', 'num_journaled')
  if record[1] == 'assigned' and record[2] == fence then
    if chunk ~= '' and tonumber(record[3] or 0) == tonumber(offset) then
      redis.call('HSET', request_key(id), 'num_journaled', offset + num_tokens)
      append(journal_key(id), LIVE_TTL_MS, 'chunk', chunk)
    end
    if state ~= '' then
      finish(id, state, result)
      redis.call('SREM', owned, id)
    end
  else
    redis.call('SREM', owned, id)
    stale[#stale + 1] = id
  end
end
return stale
