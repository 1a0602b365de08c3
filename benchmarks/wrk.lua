-- For `python -m benchmarks.load`: sends the bodies of a file in turn, and prints what wrk measured as JSON.
-- Arguments: the file with a JSON body a line, the API key.
local requests, sent = {}, 0

function init(args)
  local headers = { ["content-type"] = "application/json", ["authorization"] = "Bearer " .. args[2] }
  for body in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  sent = sent + 1
  return requests[(sent - 1) % #requests + 1]
end

function done(summary, latency)
  local errors = summary.errors
  local failed = errors.status + errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\n{"rps": %.2f, "requests": %d, "failed": %d, "p50_ms": %.4f, "p99_ms": %.4f, "p99.9_ms": %.4f, "max_ms": %.4f}\n',
    summary.requests / (summary.duration / 1e6), summary.requests, failed, latency:percentile(50) / 1000,
    latency:percentile(99) / 1000, latency:percentile(99.9) / 1000, latency.max / 1000))
end
