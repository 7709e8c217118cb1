-- Starts a workflow, for another context each time.
--
--   CONTEXT  begins the ids of contexts; another one for each measurement

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "results.lua")

local context = os.getenv("CONTEXT")
local BODY = '{"context_id": "%s%d", "name": "Carrier check call", "customer_name": "Blue Mesa Freight", "load": {"reference": %d}}'
local headers = { ["Content-Type"] = "application/json" }
local sent = 0

request = function()
  sent = sent + 1
  return wrk.format("POST", "/api/happyrobot/trigger", headers, BODY:format(context, sent, sent))
end
