"""What must happen in Redis as a whole or not at all, in Lua.

Each may be sent again when its reply was lost: done twice, it is the same as done once.
"""

# Begin a queue, or find that it is there. Returns who owns it. One that was finished begins anew for its
# owner, whose files have lost something since.
OPEN = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if not owner then
    redis.call('HSET', KEYS[1], unpack(ARGV, 2))
elseif owner == ARGV[3] and redis.call('HGET', KEYS[1], 'ended') == 'finished' then
    redis.call('HDEL', KEYS[1], 'ended', 'completed', 'failed')
end
redis.pcall('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0', 'MKSTREAM')
return redis.call('HGET', KEYS[1], 'owner')
"""

# Offer lines that were never offered: line, entry, line, entry, …
OFFER = """
for i = 1, #ARGV, 2 do
    if redis.call('SETBIT', KEYS[1], ARGV[i], 1) == 0 then
        redis.call('XADD', KEYS[2], '*', 'entry', ARGV[i + 1])
    end
end
"""

# Keep the record of a line. 1: kept; 0: it has one already; -1: the line is another runner's now.
FINISH = """
local group, runner, id, line, code, record = unpack(ARGV)
if redis.call('GETBIT', KEYS[1], line) == 1 then
    redis.call('XACK', KEYS[2], group, id)
    redis.call('XDEL', KEYS[2], id)
    return 0
end
local held = redis.call('XPENDING', KEYS[2], group, id, id, 1)
if #held == 0 or held[1][2] ~= runner then
    return -1
end
redis.call('SETBIT', KEYS[1], line, 1)
redis.call('XADD', KEYS[3], '*', 'line', line, 'code', code, 'record', record)
if code ~= '' then
    redis.call('HINCRBY', KEYS[5], 'failed', 1)
    redis.call('XADD', KEYS[4], 'MAXLEN', '~', 10000, '*', 'line', line, 'code', code, 'record', record)
end
redis.call('XACK', KEYS[2], group, id)
redis.call('XDEL', KEYS[2], id)
return 1
"""

# Take over lines of a runner whose heartbeat is gone: {id, entry, times it was delivered}, …
CLAIM = """
local group, me, other, count = unpack(ARGV)
if redis.call('EXISTS', KEYS[2]) == 1 then
    return {}
end
local held = redis.call('XPENDING', KEYS[1], group, '-', '+', count, other)
local taken = {}
for _, one in ipairs(held) do
    local entries = redis.call('XCLAIM', KEYS[1], group, me, 0, one[1])
    if #entries > 0 and entries[1] then
        taken[#taken + 1] = {one[1], entries[1][2][2], one[4] + 1}
    end
end
if #held == 0 then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], group, other)
end
return taken
"""

# Forget that lines are finished and were offered, because nobody has their records.
REOPEN = """
for _, line in ipairs(ARGV) do
    redis.call('SETBIT', KEYS[1], line, 0)
    redis.call('SETBIT', KEYS[2], line, 0)
end
"""
