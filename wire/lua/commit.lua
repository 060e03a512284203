-- Write what a group has done: tokens into journals, terminal results; one call for all of it.
-- ARGV: group, epoch, then for each request: id, fence, chunk ('' for none),
--       state ('' while it goes on), result, offset, num_tokens
-- A chunk of `num_tokens` is journaled only if it begins at `offset`, where the journal ends: one
-- that is sent again, because the reply was lost, changes nothing. State 'retry' gives the request
-- back after an error that another attempt may not have; retry.lua decides whether there is one.
-- Returns the ids that the group does not hold (any more) under that fence: for those nothing
-- was changed, and the group must stop them.

local group, epoch = ARGV[1], ARGV[2]
local owned = group_key(group, epoch, 'owned')
local stale = {}
for i = 3, #ARGV, 7 do
  local id, fence, chunk, state, result, offset, num_tokens = unpack(ARGV, i, i + 6)
  local key = request_key(id)
  local record = redis.call(
    'HMGET', key, 'state', 'fence', 'num_journaled', 'cancelled', 'owner')
  if record[1] == 'assigned' and record[2] == fence then
    if chunk ~= '' and tonumber(record[3] or 0) == tonumber(offset) then
      redis.call('HSET', key, 'num_journaled', offset + num_tokens)
      redis.call('XADD', journal_key(id), '*', 'chunk', chunk)
      if not record[3] then
        -- As long as the record: it is not prolonged either while the request goes on.
        redis.call('PEXPIRE', journal_key(id), LIVE_TTL_MS)
      end
    end
    if state ~= '' then
      redis.call('SREM', owned, id)
    end
    if state == 'retry' and record[4] then
      finish(id, 'cancelled', record[4], 'queue')
    elseif state == 'retry' then
      redis.call('HSET', key, 'state', 'delayed', 'owner', '', 'error', result)
      redis.call('HINCRBY', key, 'fence', 1)
      redis.call('HINCRBY', key, 'num_errors', 1)
      redis.call('ZADD', delayed_key(), now_ms(), id)
      redis.call('PEXPIRE', delayed_key(), LIVE_TTL_MS)
    elseif state ~= '' then
      finish(id, state, result, 'group')
    end
  else
    -- The group may hold it again, under a newer fence. Else it has left `owned` long ago, unless
    -- its record was deleted: somebody had its result before the server lost it.
    if record[5] ~= group .. ':' .. epoch then
      redis.call('SREM', owned, id)
    end
    stale[#stale + 1] = id
  end
end
return stale
