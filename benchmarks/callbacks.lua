-- Callbacks as HappyRobot sends them, each with an X-Webhook-Id that was never used before and a timestamp.
--
--   KEY        what to send as X-API-KEY
--   MARK       begins every X-Webhook-Id; another one for each measurement
--   RUN        begins the ids of runs, which end with a number from 1 to RUNS, times STEP
--   RUNS, STEP how many, and how far apart
--   LIVES      if set: each run in turn reports `running`, six logs, `completed`; the first run is the one after LIVES

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "results.lua")

local key, mark, run = os.getenv("KEY"), os.getenv("MARK"), os.getenv("RUN")
local runs, step = tonumber(os.getenv("RUNS")), tonumber(os.getenv("STEP") or "1")
local lives = tonumber(os.getenv("LIVES") or "")
local STAGES = 8

local BODY = '{"run_id": "%s%d", "event_type": "%s", "timestamp": "%s", "data": %s}'
local LOG = '{"message": "The agent has asked for the reference number", "level": "info", "seq": %d}'
local RESULT = '{"summary": "The pickup stands, at ten", "outcome": "booked", "seq": %d}'

math.randomseed(os.time())
local sent, now, looked_at = 0, "", 0

local function timestamp()
  -- Formatted once a second: the load must cost less than what it measures.
  local second = os.time()
  if second ~= looked_at then
    looked_at = second
    now = os.date("!%Y-%m-%dT%H:%M:%SZ", second)
  end
  return now
end

local function life(number)
  local stage = number % STAGES
  local place = (lives + math.floor(number / STAGES)) % runs + 1
  if stage == 0 then
    return place, "running", "{}"
  elseif stage == STAGES - 1 then
    return place, "completed", RESULT:format(number)
  end
  return place, "log", LOG:format(number)
end

request = function()
  local place, event_type, data
  if lives then
    place, event_type, data = life(sent)
  else
    place, event_type, data = math.random(1, runs) * step, "log", LOG:format(sent)
  end
  sent = sent + 1
  local headers = {
    ["Content-Type"] = "application/json",
    ["X-API-KEY"] = key,
    ["X-Webhook-Id"] = mark .. sent,
  }
  return wrk.format("POST", "/api/webhooks/happyrobot", headers, BODY:format(run, place, event_type, timestamp(), data))
end
