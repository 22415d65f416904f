"""What a store in Redis does, as one script: many steps in one go, each wholly or not at all.

Redis runs a script undisturbed, so that two processes that end the same message find out who
was first. The clock is that of Redis, less what it has jumped.
"""

from __future__ import annotations

from typing import Final

SCRIPT: Final = r"""
local P = KEYS[1]
local MAX_MESSAGES, MAX_SIZE = tonumber(ARGV[1]), tonumber(ARGV[2])
local RETENTION, MAX_DEAD, MAX_NEWS = ARGV[3], ARGV[4], ARGV[5]
local HOST, HAS_PUT = ARGV[6], ARGV[7] == '1'
local at = 8

local function arg()
  at = at + 1
  return ARGV[at - 1]
end

local time = redis.call('TIME')
local seconds = tonumber(time[1]) + tonumber(time[2]) / 1000000
local now = seconds - tonumber(redis.call('GET', P .. 'jumped') or '0')

local function snapshot(id)
  local m = redis.call('HMGET', P .. 'm:' .. id, 'body', 'number', 'attempts', 'state', 'deadline')
  if not m[1] then return false end
  return {m[1], m[2], m[3], m[4], string.format('%.6f', tonumber(m[5]) - now)}
end

-- What the other processes are told when all is done.
local stored, news = {}, {}

local function tell()
  if next(stored) == nil and #news == 0 then return end
  local addresses = {}
  for address in pairs(stored) do addresses[#addresses + 1] = address end
  local count = redis.call('INCR', P .. 'news-count')
  redis.call('XADD', P .. 'news', 'MAXLEN', '~', MAX_NEWS, '*', 'host', HOST, 'count', count,
    'what', cjson.encode({addresses, news}))
end

local function read(id)
  local m = redis.call('HMGET', P .. 'm:' .. id,
    'state', 'address', 'key', 'size', 'event', 'number', 'attempts', 'all')
  return {id = id, state = m[1], address = m[2], key = m[3], size = m[4], event = m[5],
    number = m[6], attempts = m[7], all = m[8] == '1',
    is_open = m[1] == 'pending' or m[1] == 'in_flight'}
end

local function ended(m)
  return {m.id, m.address, m.event, m.number, m.attempts, m.state}
end

local function finish(m, state, is_dead)
  local name = P .. 'm:' .. m.id
  m.state = state
  redis.call('HSET', name, 'state', state, 'attempts', m.attempts)
  redis.call('EXPIRE', name, RETENTION)
  redis.call('ZREM', P .. 'box:' .. m.address, m.id)
  redis.call('ZREM', P .. 'deadlines', m.id)
  redis.call('DECRBY', P .. 'size', m.size)
  if m.all then
    redis.call('DEL', P .. 'acks:' .. m.id)
    redis.call('SREM', P .. 'all:' .. m.address, m.id)
  end
  if m.key ~= '' then redis.call('HDEL', P .. 'keys', m.key) end
  local told = ended(m)
  news[#news + 1] = ended(m)
  if is_dead then
    local body = redis.call('HGET', name, 'body')
    redis.call('XADD', P .. 'dead', 'MAXLEN', '~', MAX_DEAD, '*', 'body', body,
      'number', m.number, 'attempts', m.attempts, 'state', state,
      'at', string.format('%.3f', seconds))
    told[7] = body
  end
  return told
end

-- What Redis has thrown out must not keep the rest from being found.
local function forget(id, address)
  redis.call('ZREM', P .. 'deadlines', id)
  if address then
    redis.call('ZREM', P .. 'box:' .. address, id)
    redis.call('SREM', P .. 'all:' .. address, id)
  end
end

local function have_all(m)
  if redis.call('SCARD', P .. 'acks:' .. m.id) == 0 then return false end
  return #redis.call('SDIFF', P .. 'devices:' .. m.address, P .. 'acks:' .. m.id) == 0
end

local function leave(address, device)
  local found = {}
  if redis.call('SREM', P .. 'devices:' .. address, device) == 0 then return found end
  for _, id in ipairs(redis.call('SMEMBERS', P .. 'all:' .. address)) do
    local m = read(id)
    if m.is_open and have_all(m) then
      found[#found + 1] = finish(m, 'delivered', false)
    end
  end
  return found
end

-- A Redis whose memory is full takes nothing more, but has to be told what has ended. It lets a
-- script that has begun to write go on.
local is_full = false
if HAS_PUT then
  local probed = redis.pcall('SET', P .. 'probe', '1')
  is_full = type(probed) == 'table' and probed.err ~= nil
end
redis.call('DEL', P .. 'probe')

local steps = {}

function steps.put()
  local id, body, address, event, key = arg(), arg(), arg(), arg(), arg()
  local all, lifetime, size = arg(), tonumber(arg()), tonumber(arg())
  if redis.call('EXISTS', P .. 'm:' .. id) == 1 then return {snapshot(id), false} end
  local older, count, freed = nil, 1, 0
  if key ~= '' then
    local found = redis.call('HGET', P .. 'keys', key)
    if found then older = read(found) end
    if older and older.is_open then count, freed = 0, tonumber(older.size) else older = nil end
  end
  count = count + redis.call('ZCARD', P .. 'deadlines')
  local used = tonumber(redis.call('GET', P .. 'size') or '0')
  if is_full or count > MAX_MESSAGES or used - freed + size > MAX_SIZE then
    return {false, false}
  end
  local replaced = older and finish(older, 'replaced', false) or false
  local number = redis.call('INCR', P .. 'numbers')
  local deadline = string.format('%.6f', now + lifetime)
  redis.call('HSET', P .. 'm:' .. id, 'body', body, 'address', address, 'event', event,
    'key', key, 'all', all, 'size', size, 'number', number, 'attempts', 0, 'state', 'pending',
    'deadline', deadline)
  redis.call('ZADD', P .. 'box:' .. address, number, id)
  redis.call('ZADD', P .. 'deadlines', deadline, id)
  redis.call('INCRBY', P .. 'size', size)
  if key ~= '' then redis.call('HSET', P .. 'keys', key, id) end
  if all == '1' then redis.call('SADD', P .. 'all:' .. address, id) end
  stored[address] = true
  return {number, replaced}
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
  if not m.state then return 0 end
  if not m.is_open then return {0, ended(m)} end
  m.attempts = m.attempts + attempts
  if m.all then
    redis.call('HSET', P .. 'm:' .. id, 'attempts', m.attempts)
    redis.call('SADD', P .. 'acks:' .. id, device)
    if not have_all(m) then return false end
  end
  return {1, finish(m, 'delivered', false)}
end

function steps.finish()
  local id, state, is_dead = arg(), arg(), arg()
  local m = read(id)
  if not m.state then return 0 end
  if not m.is_open then return {0, ended(m)} end
  return {1, finish(m, state, is_dead == '1')}
end

function steps.abandon()
  local address, state, is_dead, limit = arg(), arg(), arg(), tonumber(arg())
  local found = {}
  for _, id in ipairs(redis.call('ZRANGE', P .. 'box:' .. address, 0, limit - 1)) do
    local m = read(id)
    if m.is_open then
      found[#found + 1] = finish(m, state, is_dead == '1')
    else
      forget(id, address)
    end
  end
  return found
end

function steps.waiting()
  local address, after, limit = arg(), arg(), arg()
  local found, last = {}, 0
  local listed = redis.call('ZRANGEBYSCORE', P .. 'box:' .. address, '(' .. after, '+inf',
    'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #listed, 2 do
    last = listed[i + 1]
    local one = snapshot(listed[i])
    if one then found[#found + 1] = one else forget(listed[i], address) end
  end
  return {found, last, #listed / 2}
end

function steps.find()
  return snapshot(arg())
end

function steps.dead_letters()
  return redis.call('XREVRANGE', P .. 'dead', '+', '-', 'COUNT', arg())
end

function steps.stay()
  local patience = arg()
  local was_known = redis.call('EXISTS', P .. 'alive:' .. HOST)
  redis.call('SET', P .. 'alive:' .. HOST, 1, 'PX', patience)
  return was_known
end

function steps.expire()
  local limit = arg()
  local found = {}
  local ids = redis.call('ZRANGEBYSCORE', P .. 'deadlines', '-inf', string.format('%.6f', now),
    'LIMIT', 0, limit)
  for _, id in ipairs(ids) do
    local m = read(id)
    if m.is_open then found[#found + 1] = finish(m, 'expired', true) else forget(id) end
  end
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

-- Forgets some devices of a process, unless it lives.
function steps.bury()
  local host, limit = arg(), arg()
  local found = {}
  if redis.call('EXISTS', P .. 'alive:' .. host) == 1 then return {found, 0} end
  local pairs = redis.call('SPOP', P .. 'host:' .. host, limit)
  for _, pair in ipairs(pairs) do
    local both = cjson.decode(pair)
    for _, one in ipairs(leave(both[1], both[2])) do found[#found + 1] = one end
  end
  if #pairs == 0 then redis.call('SREM', P .. 'hosts', host) end
  return {found, #pairs}
end

local results = {}
local is_done, failure = pcall(function()
  while at <= #ARGV do results[#results + 1] = steps[arg()]() end
end)
tell()
if not is_done then error(failure) end
return results
"""
