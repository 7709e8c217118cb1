-- Shared by the scripts beside it: counts what was not answered as it should be, and says at the end, in a line of JSON
-- that load.py reads, what wrk has seen.

-- Globals, because `done` lives in a Lua state of its own and reads them from the thread's.
refused, refused_with, copies = 0, 0, 0

response = function(status, _, body)
  if status < 200 or status > 299 then
    refused = refused + 1
    refused_with = status
  elseif body:find('"duplicate"', 1, true) then
    copies = copies + 1
  end
end

local threads = {}

setup = function(thread)
  table.insert(threads, thread)
end

local LINE = '{"answers": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f, "refused": %d, "refused_with": %d, '
  .. '"copies": %d, "broken": %d, "timeouts": %d}\n'

done = function(summary, latency)
  local thread, errors = threads[1], summary.errors
  io.write(LINE:format(
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    thread:get("refused"), thread:get("refused_with"), thread:get("copies"),
    errors.connect + errors.read + errors.write, errors.timeout
  ))
end
