-- Reads one of many addresses, drawn anew each time.
--
--   BEFORE, AFTER  what the address begins and ends with
--   MANY, STEP     between them stands a number from 1 to MANY, times STEP; nothing if MANY is 0

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "results.lua")

local before, after = os.getenv("BEFORE"), os.getenv("AFTER") or ""
local many, step = tonumber(os.getenv("MANY") or "0"), tonumber(os.getenv("STEP") or "1")

math.randomseed(os.time())

request = function()
  local drawn = many > 0 and tostring(math.random(1, many) * step) or ""
  return wrk.format("GET", before .. drawn .. after)
end
