"""The steps of the store in Redis as one script: a batch of them, each wholly or not at all.

Redis runs nothing else meanwhile: of two processes that end the same message, the first one does.
The clock is that of Redis, less its jumps.

The module is longer than others since Redis takes a script as one text.

====================================== =========================================================
key                                    what it holds
====================================== =========================================================
``m:<id>``, ``b:<id>``                 A message that waits or is a dead letter: the fields that
                                       may change, as a hash with short values, which Redis packs;
                                       and its text.
``mailbox:<address>``                  Ids of the messages that wait for a recipient, by number.
``deadlines``                          Ids of all messages that wait, by deadline.
``keys``                               Ids of the messages that a newer one may replace, by key.
``all:<address>``, ``acks:<id>``       Ids of a recipient's messages that require all devices; the
                                       devices that have acknowledged one, as its ``by`` names.
``ended``, ``ended-order``             Receipts by id; and, oldest first, the expiry, size and id
                                       of each.
``dead``                               Ids of dead letters, by time of death.
``changes``, ``changes-sizes``,        The change feed, a stream; the size of each of its entries;
``changes-count``                      the number of the newest.
``size``, ``ended-size``,              Bytes that messages, receipts, dead letters and the change
``dead-size``, ``changes-size``        feed take.
``devices:<address>``                  The devices of an identity.
``hosts``, ``host:<host>``,            The processes; the identities and devices that each has
``alive:<host>``                       announced; its heartbeat.
``told``                               For each process, the number of the entry of the change
                                       feed up to which it has told all ends of its own.
``numbers``                            The number of the newest message.
``jumped``                             Seconds that the clock of Redis has jumped.
``version``, ``leader``                :data:`.redis_store.VERSION`; the lease of the leader.
====================================== =========================================================
"""

from __future__ import annotations

from typing import Final

SCRIPT: Final = r"""
local P = KEYS[1]
local MAX_MESSAGES, MAX_SIZE = tonumber(ARGV[1]), tonumber(ARGV[2])
local RETENTION, MAX_ENDED_SIZE = tonumber(ARGV[3]), tonumber(ARGV[4])
local MAX_DEAD, MAX_DEAD_SIZE = tonumber(ARGV[5]), tonumber(ARGV[6])
local DEAD_RETENTION = tonumber(ARGV[7])
local MAX_CHANGES, MAX_CHANGES_SIZE = tonumber(ARGV[8]), tonumber(ARGV[9])
local MAX_NAMED, NAME_SIZE = 64, 300
local RECEIPT_SIZE, HOST, IS_PROBING = tonumber(ARGV[10]), ARGV[11], ARGV[12] == '1'
local at = 13

local function arg()
  at = at + 1
  return ARGV[at - 1]
end

local seconds, now = 0, 0
if ARGV[at] ~= 'heartbeat' or #ARGV > at + 4 then -- which needs no time by itself
  local time = redis.call('TIME')
  seconds = tonumber(time[1]) + tonumber(time[2]) / 1000000
  now = seconds - tonumber(redis.call('GET', P .. 'jumped') or '0')
end

-- What is kept, in bytes, as it was and by how much it has changed.
local sizes = {}

local function size(name)
  local one = sizes[name]
  if not one then
    one = {tonumber(redis.call('GET', P .. name) or '0'), 0}
    sizes[name] = one
  end
  return one[1] + one[2]
end

local function add(name, bytes)
  size(name)
  sizes[name][2] = sizes[name][2] + bytes
end

local function note_sizes()
  for name, one in pairs(sizes) do
    if one[2] ~= 0 then redis.call('INCRBY', P .. name, string.format('%.0f', one[2])) end
  end
end

local function snapshot(id)
  local m = redis.call('HMGET', P .. 'm:' .. id, 'number', 'attempts', 'state', 'deadline', 'by')
  local body = redis.call('GET', P .. 'b:' .. id)
  if not m[1] or not body then return false end
  local left = string.format('%.6f', tonumber(m[4]) - now)
  return {body, m[1], m[2], m[3], left, m[5] and cjson.decode(m[5])}
end

-- What the other processes are told when all is done.
local stored, changes = {}, {}

local function tell()
  if next(stored) == nil and #changes == 0 then return 0 end
  local addresses = {}
  for address in pairs(stored) do addresses[#addresses + 1] = address end
  local count = redis.call('INCR', P .. 'changes-count')
  local what = cjson.encode({addresses, changes})
  redis.call('XADD', P .. 'changes', '*', 'host', HOST, 'count', count, 'what', what)
  add('changes-size', #what + 100)
  local kept = redis.call('RPUSH', P .. 'changes-sizes', #what + 100)
  local gone = 0
  while kept > MAX_CHANGES or (kept > 1 and size('changes-size') > MAX_CHANGES_SIZE) do
    add('changes-size', -tonumber(redis.call('LPOP', P .. 'changes-sizes')))
    kept, gone = kept - 1, gone + 1
  end
  if gone > 0 then redis.call('XTRIM', P .. 'changes', 'MAXLEN', kept) end
  return count
end

local function read(id)
  local m = redis.call('HMGET', P .. 'm:' .. id,
    'state', 'address', 'key', 'size', 'event', 'number', 'attempts', 'all', 'by')
  return {id = id, state = m[1], address = m[2], key = m[3], size = m[4], event = m[5],
    number = m[6], attempts = m[7], all = m[8] == '1', by = m[9] and cjson.decode(m[9]),
    is_open = m[1] == 'pending' or m[1] == 'in_flight'}
end

local function ended(m)
  return {m.id, m.address, m.event, m.number, m.attempts, m.state, m.by or false}
end

-- What is known of a message that has ended.
local function receipt(m)
  if m.state then return ended(m) end
  local found = redis.call('HGET', P .. 'ended', m.id)
  return found and cjson.decode(found) or false
end

local function forget_ended(limit)
  for _ = 1, limit do
    local oldest = redis.call('LINDEX', P .. 'ended-order', 0)
    if not oldest then return end
    local expires_at, bytes, id = string.match(oldest, '^(%S+) (%d+) (.*)$')
    if tonumber(expires_at) > now and size('ended-size') <= MAX_ENDED_SIZE then return end
    redis.call('LPOP', P .. 'ended-order')
    redis.call('HDEL', P .. 'ended', id)
    add('ended-size', -tonumber(bytes))
  end
end

local function forget_dead(limit)
  for _ = 1, limit do
    local oldest = redis.call('ZRANGE', P .. 'dead', 0, 0, 'WITHSCORES')
    if #oldest == 0 then return end
    if tonumber(oldest[2]) > now - DEAD_RETENTION and size('dead-size') <= MAX_DEAD_SIZE
      and redis.call('ZCARD', P .. 'dead') <= MAX_DEAD then return end
    local name = P .. 'm:' .. oldest[1]
    add('dead-size', -tonumber(redis.call('HGET', name, 'size') or '0'))
    redis.call('DEL', name, P .. 'b:' .. oldest[1])
    redis.call('ZREM', P .. 'dead', oldest[1])
  end
end

local function finish(m, state, is_dead)
  local name, body = P .. 'm:' .. m.id, P .. 'b:' .. m.id
  m.state = state
  redis.call('ZREM', P .. 'mailbox:' .. m.address, m.id)
  redis.call('ZREM', P .. 'deadlines', m.id)
  add('size', -tonumber(m.size))
  if m.all then
    redis.call('DEL', P .. 'acks:' .. m.id)
    redis.call('SREM', P .. 'all:' .. m.address, m.id)
  end
  if m.key ~= '' then redis.call('HDEL', P .. 'keys', m.key) end
  local told = ended(m)
  local text = cjson.encode(told)
  local bytes = RECEIPT_SIZE + #text
  redis.call('HSET', P .. 'ended', m.id, text)
  redis.call('RPUSH', P .. 'ended-order',
    string.format('%.3f %d %s', now + RETENTION, bytes, m.id))
  add('ended-size', bytes)
  changes[#changes + 1] = ended(m)
  if is_dead then
    told[8] = redis.call('GET', body)
    redis.call('HSET', name, 'state', state, 'attempts', m.attempts,
      'at', string.format('%.3f', seconds))
    -- Those that end at a time keep their order.
    local died_at, newest = now, redis.call('ZREVRANGE', P .. 'dead', 0, 0, 'WITHSCORES')
    if newest[2] and tonumber(newest[2]) >= now then died_at = tonumber(newest[2]) + 0.000001 end
    redis.call('ZADD', P .. 'dead', string.format('%.6f', died_at), m.id)
    add('dead-size', tonumber(m.size))
    forget_dead(MAX_DEAD)
  else
    redis.call('DEL', name, body)
  end
  return told
end

-- What Redis has thrown out, or others have put there, must not keep the rest from being found.
local function forget(id, address)
  redis.call('ZREM', P .. 'deadlines', id)
  if redis.call('EXISTS', P .. 'deadlines') == 0 then add('size', -size('size')) end
  if address then
    redis.call('ZREM', P .. 'mailbox:' .. address, id)
    redis.call('SREM', P .. 'all:' .. address, id)
  end
end

-- Ends those of some messages that have not ended.
local function finish_each(ids, address, state, is_dead)
  local found = {}
  for _, id in ipairs(ids) do
    local is_read, m = pcall(read, id)
    if is_read and m.is_open then
      local is_finished, one = pcall(finish, m, state, is_dead)
      if is_finished then found[#found + 1] = one else forget(id, address) end
    else
      forget(id, address)
    end
  end
  return found
end

local function note_device(m, device)
  local by = m.by or {0}
  for i = 2, #by do
    if by[i] == device then return end
  end
  by[1] = by[1] + 1
  by[#by + 1] = device
  local bytes = #by > MAX_NAMED + 1 and 0 or NAME_SIZE
  if bytes == 0 then table.remove(by, 2) end
  m.size, m.by = m.size + bytes, by
  add('size', bytes)
  redis.call('HSET', P .. 'm:' .. m.id, 'by', cjson.encode(by), 'size', m.size)
end

local function have_all(m)
  if redis.call('SCARD', P .. 'acks:' .. m.id) == 0 then return false end
  return #redis.call('SDIFF', P .. 'devices:' .. m.address, P .. 'acks:' .. m.id) == 0
end

local function leave(address, device)
  local complete = {}
  if redis.call('SREM', P .. 'devices:' .. address, device) == 0 then return complete end
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'all:' .. address)) do
    local is_read, m = pcall(read, id)
    if is_read and m.is_open and have_all(m) then complete[#complete + 1] = id end
  end
  return finish_each(complete, address, 'delivered', false)
end

-- A Redis whose memory is full takes nothing more, but has to be told what has ended. It lets a
-- script that has begun to write go on.
local is_full = false
if IS_PROBING then
  local probed = redis.pcall('SET', P .. 'probe', '1')
  is_full = type(probed) == 'table' and probed.err ~= nil
end
redis.call('DEL', P .. 'probe')

local steps = {}

local function store(id, body, address, event, key, all, ttl, bytes, number)
  local deadline = string.format('%.6f', now + ttl)
  redis.call('ZADD', P .. 'mailbox:' .. address, number, id)
  redis.call('ZADD', P .. 'deadlines', deadline, id)
  if key ~= '' then redis.call('HSET', P .. 'keys', key, id) end
  if all == '1' then redis.call('SADD', P .. 'all:' .. address, id) end
  redis.call('SET', P .. 'b:' .. id, body)
  redis.call('HSET', P .. 'm:' .. id, 'address', address, 'event', event,
    'key', key, 'all', all, 'size', bytes, 'number', number, 'attempts', 0, 'state', 'pending',
    'deadline', deadline)
end

function steps.put()
  local id, body, address, event, key = arg(), arg(), arg(), arg(), arg()
  local all, ttl, bytes = arg(), tonumber(arg()), tonumber(arg())
  local known = read(id)
  if known.is_open then return {1, snapshot(id), false} end
  known = receipt(known)
  if known then return {0, known, false} end
  local older, count, freed = nil, 1, 0
  if key ~= '' then
    local found = redis.call('HGET', P .. 'keys', key)
    if found then older = read(found) end
    if older and older.is_open then count, freed = 0, tonumber(older.size) else older = nil end
  end
  count = count + redis.call('ZCARD', P .. 'deadlines')
  local full = is_full and 'memory' or count > MAX_MESSAGES and 'messages'
    or size('size') - freed + bytes > MAX_SIZE and 'size'
  if full then return {0, false, false, full} end
  local replaced = older and finish(older, 'replaced', false) or false
  local number = redis.call('INCR', P .. 'numbers')
  local is_stored, failure = pcall(store, id, body, address, event, key, all, ttl, bytes,
    number)
  if not is_stored then
    redis.call('DEL', P .. 'm:' .. id, P .. 'b:' .. id)
    redis.pcall('ZREM', P .. 'mailbox:' .. address, id)
    redis.pcall('ZREM', P .. 'deadlines', id)
    redis.pcall('SREM', P .. 'all:' .. address, id)
    if key ~= '' then redis.pcall('HDEL', P .. 'keys', key) end
    error(failure, 0)
  end
  add('size', bytes)
  stored[address] = true
  return {1, number, replaced}
end

function steps.mark()
  local id, attempts, state = arg(), arg(), arg()
  local m = redis.call('HMGET', P .. 'm:' .. id, 'state', 'attempts')
  if m[1] == 'pending' or m[1] == 'in_flight' then
    redis.call('HSET', P .. 'm:' .. id, 'state', state, 'attempts', m[2] + attempts)
  end
  return 1
end

function steps.acknowledge()
  local id, device, attempts = arg(), arg(), arg()
  local m = read(id)
  if not m.is_open then return {0, receipt(m)} end
  m.attempts = m.attempts + attempts
  if m.all then
    redis.call('HSET', P .. 'm:' .. id, 'attempts', m.attempts)
    -- Devices that have left do not count, however many come and go.
    if redis.call('SCARD', P .. 'acks:' .. id) >= MAX_NAMED then
      redis.call('SINTERSTORE', P .. 'acks:' .. id, P .. 'acks:' .. id,
        P .. 'devices:' .. m.address)
    end
    if redis.call('SADD', P .. 'acks:' .. id, device) == 1 then note_device(m, device) end
    if not have_all(m) then return false end
  end
  return {1, finish(m, 'delivered', false)}
end

function steps.finish()
  local id, state, is_dead = arg(), arg(), arg()
  local m = read(id)
  if not m.is_open then return {0, receipt(m)} end
  return {1, finish(m, state, is_dead == '1')}
end

function steps.fail_all()
  local address, state, is_dead, limit = arg(), arg(), arg(), tonumber(arg())
  local ids = redis.call('ZRANGE', P .. 'mailbox:' .. address, 0, limit - 1)
  return finish_each(ids, address, state, is_dead == '1')
end

function steps.waiting()
  local address, after, limit, max_size = arg(), arg(), tonumber(arg()), tonumber(arg())
  local found, last, bytes = {}, 0, 0
  local listed = redis.call('ZRANGEBYSCORE', P .. 'mailbox:' .. address, '(' .. after, '+inf',
    'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #listed, 2 do
    local is_read, one = pcall(snapshot, listed[i])
    if is_read and one then
      bytes = bytes + #one[1]
      if #found > 0 and bytes > max_size then return {found, last, 1} end
      found[#found + 1] = one
    else
      forget(listed[i], address)
    end
    last = listed[i + 1]
  end
  return {found, last, #listed / 2 == limit and 1 or 0}
end

function steps.find()
  local id = arg()
  local m = read(id)
  if m.is_open then return {1, snapshot(id)} end
  return {0, receipt(m)}
end

function steps.dead_letters()
  local limit, found = tonumber(arg()), {}
  forget_dead(MAX_DEAD)
  for _, id in ipairs(redis.call('ZREVRANGE', P .. 'dead', 0, limit - 1)) do
    local is_read, one = pcall(snapshot, id)
    if is_read and one then
      one[7] = redis.call('HGET', P .. 'm:' .. id, 'at')
      found[#found + 1] = one
    end
  end
  return found
end

function steps.heartbeat()
  local patience, told, has_moved = arg(), arg(), arg() == '1'
  local was_known = redis.call('EXISTS', P .. 'alive:' .. HOST)
  redis.call('SET', P .. 'alive:' .. HOST, 1, 'PX', patience)
  if has_moved or was_known == 0 then redis.call('HSET', P .. 'told', HOST, told) end
  return was_known
end

function steps.expire()
  local limit = arg()
  local ids = redis.call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', string.format('%.6f', now),
    'LIMIT', 0, limit)
  local found = finish_each(ids, nil, 'expired', true)
  forget_dead(MAX_DEAD)
  forget_ended(1000)
  return found
end

function steps.join()
  local address, device, pair = arg(), arg(), arg()
  redis.call('SADD', P .. 'devices:' .. address, device)
  redis.call('SADD', P .. 'hosts', HOST)
  redis.call('SADD', P .. 'host:' .. HOST, pair)
  return 1
end

function steps.leave()
  local address, device, pair = arg(), arg(), arg()
  redis.call('SREM', P .. 'host:' .. HOST, pair)
  return leave(address, device)
end

-- Forgets some devices of a process, and in the end the process, unless it lives.
function steps.reap()
  local host, limit = arg(), arg()
  local found = {}
  if redis.call('EXISTS', P .. 'alive:' .. host) == 1 then return {found, 0} end
  local pairs = redis.call('SPOP', P .. 'host:' .. host, limit)
  for _, pair in ipairs(pairs) do
    local both = cjson.decode(pair)
    for _, one in ipairs(leave(both[1], both[2])) do found[#found + 1] = one end
  end
  if #pairs == 0 then
    redis.call('SREM', P .. 'hosts', host)
    redis.call('HDEL', P .. 'told', host)
  end
  return {found, #pairs}
end

-- An error belongs to its own step: each comes with how many arguments it has.
local results, failures = {}, {}
while at <= #ARGV do
  local kind, count = arg(), tonumber(arg())
  local ends_at = at + count
  local is_done, result = pcall(steps[kind])
  if not is_done then
    failures[#failures + 1] = #results
    failures[#failures + 1] = type(result) == 'table' and result.err or tostring(result)
    result = false
  end
  results[#results + 1] = result
  at = ends_at
end
forget_ended(2 * #changes)
local is_told, count = pcall(tell)
note_sizes()
if not is_told then error(count, 0) end
local usage = false
if IS_PROBING or sizes['size'] then
  usage = {redis.call('ZCARD', P .. 'deadlines'), size('size'), is_full and 1 or 0}
end
return {results, failures, usage, count}
"""
