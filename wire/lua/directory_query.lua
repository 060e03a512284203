-- How much of each prompt every living group has in its cache.
-- ARGV for each prompt: its chain, the hashes of its blocks from the first on, HASH_BYTES each, in a
-- row
-- What a group holds is closed under prefixes (a block is held only if the one before it is), and so
-- is the part of it on the device: where it ends is found by bisecting, in some 13 looks for a
-- prompt of 6,250 blocks, instead of by listing the holders of each block. An entry that is wrong
-- for the moment makes a length wrong, which costs computing, never correctness.
-- Returns a list of the groups ('group:epoch') that hold any of it, then for each prompt a string of
-- records: which of these groups (from 0 on), how many blocks it has on the device, and how many in
-- all: three little-endian uint32. A group that has none of a prompt is left out.

local HASH_BYTES = 16

-- The chain's blocks up to the `first`th are in the set. How many are there in all?
local function length(key, chain, first)
  local low, high = first, #chain / HASH_BYTES
  local middle = low + 1 -- most groups have nothing of most prompts: that is the first look
  while low < high do
    local hash = string.sub(chain, (middle - 1) * HASH_BYTES + 1, middle * HASH_BYTES)
    if redis.call('SISMEMBER', key, hash) == 1 then
      low = middle
    else
      high = middle - 1
    end
    middle = math.floor((low + high + 1) / 2)
  end
  return low
end

local groups, found = {}, {}
for prompt = 1, #ARGV do
  found[prompt] = {}
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', groups_key(), '(' .. now_ms(), '+inf')) do
  local group, epoch = string.match(member, '^(.*):(%d+)$')
  local device = group_key(group, epoch, 'cache:device')
  local host = group_key(group, epoch, 'cache:host')
  local has_host = redis.call('EXISTS', host) == 1
  local index
  for prompt, chain in ipairs(ARGV) do
    local num_device = length(device, chain, 0)
    local num_blocks = has_host and length(host, chain, num_device) or num_device
    if num_blocks > 0 then
      if not index then
        index = #groups
        groups[index + 1] = member
      end
      local records = found[prompt]
      records[#records + 1] = struct.pack('<I4I4I4', index, num_device, num_blocks)
    end
  end
end
local reply = {groups}
for prompt = 1, #ARGV do
  reply[prompt + 1] = table.concat(found[prompt])
end
return reply
