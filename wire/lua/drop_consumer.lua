-- Take a consumer out of a stream's consumer group, unless entries are pending for it: those would
-- be thrown away with it. ARGV: stream, consumer group, consumer
-- Returns 1 if it is gone, 0 if it has pending entries.

local stream, group, consumer = unpack(ARGV)
if redis.call('EXISTS', stream) == 0 then
  return 1
end
if #redis.call('XPENDING', stream, group, '-', '+', 1, consumer) > 0 then
  return 0
end
redis.call('XGROUP', 'DELCONSUMER', stream, group, consumer)
return 1
