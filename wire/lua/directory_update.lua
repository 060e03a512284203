-- What has changed in a group's cache of blocks.
-- ARGV: group, epoch, number, reset (0|1), device, host, gone
--       the last three: hashes of blocks, HASH_BYTES each, in a row
-- `device` lists the blocks that are in the device's memory now, `host` those that are in host
-- memory alone, `gone` those that are in neither. The updates of one life of a group are numbered
-- from 1 on: only the one that follows the last is carried out, so one that is repeated, late or
-- out of turn changes nothing. One that is a `reset` begins from an empty cache, at any number
-- above the last. Number 0 only asks.
-- Returns the number of the last update that was carried out; -1, and nothing was changed, when the
-- group does not live under this epoch (not yet, not any more, or another one has taken its place).

local HASH_BYTES = 16
local AT_ONCE = 1000 * HASH_BYTES -- a command takes some thousand arguments from Lua, not more

local group, epoch, number, reset = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4] == '1'
local device_hashes, host_hashes, gone_hashes = ARGV[5], ARGV[6], ARGV[7]

local lease = tonumber(redis.call('ZSCORE', groups_key(), group .. ':' .. epoch) or DECLARED_DEAD)
if lease == DECLARED_DEAD or redis.call('GET', epoch_key(group)) ~= epoch then
  return -1
end
local state = group_key(group, epoch, 'cache')
local last = tonumber(redis.call('HGET', state, 'number') or 0)
if number <= last or (number > last + 1 and not reset) then
  return last
end

local function change(command, key, hashes)
  for first = 1, #hashes, AT_ONCE do
    local members = {}
    for at = first, math.min(first + AT_ONCE, #hashes + 1) - 1, HASH_BYTES do
      members[#members + 1] = string.sub(hashes, at, at + HASH_BYTES - 1)
    end
    redis.call(command, key, unpack(members))
  end
end

if reset then
  forget_cache(group, epoch)
end
local device, host = group_key(group, epoch, 'cache:device'), group_key(group, epoch, 'cache:host')
if redis.call('EXISTS', device) == 1 then
  change('SREM', device, host_hashes)
  change('SREM', device, gone_hashes)
end
if redis.call('EXISTS', host) == 1 then
  change('SREM', host, device_hashes)
  change('SREM', host, gone_hashes)
end
change('SADD', device, device_hashes)
change('SADD', host, host_hashes)
redis.call('HSET', state, 'number', number)
renew_cache(group, epoch)
return number
