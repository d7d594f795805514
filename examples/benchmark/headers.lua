-- For wrk: nine headers of a browser (besides Host); one of them, Referer, is never the same twice.
wrk.headers["User-Agent"] = "Mozilla/5.0 (X11; Linux x86_64; rv:128.0) Gecko/20100101 Firefox/128.0"
wrk.headers["Accept"] = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
wrk.headers["Accept-Language"] = "en-US,en;q=0.7,de;q=0.3"
wrk.headers["Accept-Encoding"] = "gzip, deflate, br, zstd"
wrk.headers["Connection"] = "keep-alive"
wrk.headers["Cookie"] = "session=4bf92f3577b34da6a3ce929d0e0e4736; theme=dark; seen=1"
wrk.headers["Upgrade-Insecure-Requests"] = "1"
wrk.headers["Sec-Fetch-Site"] = "same-origin"
wrk.headers["Referer"] = "http://localhost/list?page=UNIQUE"

local before, after
local count = os.time() * 1e6   -- so a second run against the same server repeats nothing

function init(args)
  before, after = wrk.format("GET"):match("^(.-)UNIQUE(.*)$")
end

function request()
  count = count + 1
  return before .. string.format("%.0f", count) .. after
end
