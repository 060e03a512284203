-- A worker group (re)starts: it gets a new epoch, which makes all that it held before stale.
-- ARGV: group, model name, model card
-- What its last life had cached is gone from the directory.
-- Returns the epoch. The group is alive from its first heartbeat on.

local group, model, card = ARGV[1], ARGV[2], ARGV[3]
local last = redis.call('GET', epoch_key(group))
if last then
  forget_cache(group, last)
end
-- It must not come again, not even on a server that has lost its last second: its clock has gone
-- on since then.
local epoch = math.max(tonumber(last or 0) + 1, now_ms())
redis.call('SET', epoch_key(group), epoch, 'PX', LIVE_TTL_MS)
redis.call('SET', PREFIX .. ':model:' .. model, card, 'PX', LIVE_TTL_MS)
return epoch
