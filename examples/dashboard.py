"""Draws the server's figures while it works, at /dashboard; has them for Prometheus at /metrics.

In an application of your own: app.merge(dashboard.app). The figures are for this machine alone.

    $ python minibottle.py examples.dashboard:app --status /status
    $ curl http://127.0.0.1:8080/status?ready
    {"ready": true}
"""

from minibottle import App, abort, request, response
from minibottle.proxies import is_local
from minibottle.status import read_status

app = App()


@app.get("/dashboard")
def dashboard():
    response.set_header("Content-Security-Policy", "default-src 'none'; connect-src 'self'; "
                        "style-src 'unsafe-inline'; script-src 'unsafe-inline'")
    return PAGE.replace("STATUS", request.environ["minibottle.settings"].status or "/status")


@app.get("/metrics")
def metrics():
    if not is_local(request.environ):
        abort(403, "These figures are for this machine alone.")
    response.content_type = "text/plain; version=0.0.4; charset=utf-8"
    return format_prometheus(read_status())


def format_prometheus(status):
    """The figures in Prometheus' text format."""
    lines = []

    def add(name, kind, rows):
        lines.append(f"# TYPE minibottle_{name} {kind}")
        lines.extend(f"minibottle_{name}{more} {number}" for more, number in rows)

    for name in "requests", "aborted", "bytes", "hand_overs", "starts":
        add(name + "_total", "counter", [("", status[name])])
    add("responses_total", "counter", [
        (f'{{class="{name}"}}', number) for name, number in status["responses"].items()])
    add("seconds", "histogram", [
        *((f'_bucket{{le="{seconds.replace("inf", "+Inf")}"}}', number)
          for seconds, number in status["latency"].items()),
        ("_sum", status["seconds"]), ("_count", status["latency"]["inf"])])
    for name in "connections", "threads", "busy_threads", "waiting", "memory":
        add(name, "gauge", [(f'{{worker="{i}"}}', worker[name])
                            for i, worker in enumerate(status["workers"])])
    return "\n".join(lines) + "\n"


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>minibottle</title>
<meta name="viewport" content="width=device-width">
<style>
:root { color-scheme: light dark; --line: #8886; --pen: #27c; }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1rem auto; padding: 0 1rem;
  max-width: 80rem; }
h1 { font-size: 1.3rem; margin: 0 0 .6rem; }
#plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 4px; padding: .5rem; }
figcaption b { float: right; }
svg { width: 100%; height: 4.5rem; display: block; }
polyline { fill: none; stroke: var(--pen); stroke-width: 2; vector-effect: non-scaling-stroke; }
#table { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .5rem; border-top: 1px solid var(--line);
  white-space: nowrap; }
#error { color: #c22; }
</style></head>
<body><h1>minibottle <span id="error"></span></h1>
<div id="plots"></div>
<div id="table"></div>
<script>
const POINTS = 120, series = {};
let last = null;

function plot(name, value, text) {
  let one = series[name];
  if (!one) {
    const figure = document.createElement("figure");
    figure.innerHTML = '<figcaption><b></b><span></span></figcaption>' +
      '<svg viewBox="0 0 119 40" preserveAspectRatio="none"><polyline/></svg>';
    figure.querySelector("span").textContent = name;
    document.getElementById("plots").append(figure);
    one = series[name] = {figure, values: []};
  }
  one.values.push(value);
  one.values = one.values.slice(-POINTS);
  const top = Math.max(...one.values, 1e-9), start = POINTS - one.values.length;
  one.figure.querySelector("polyline").setAttribute("points", one.values.map(
    (v, i) => (start + i) + "," + (39 - 38 * v / top).toFixed(1)).join(" "));
  one.figure.querySelector("b").textContent = text;
}

function quantile(now, before, q) {  // the bound of the bucket that has it
  const names = Object.keys(now.latency).sort((a, b) =>
    now.latency[a] - now.latency[b] || (a == "inf") - (b == "inf") || a - b);
  const count = name => now.latency[name] - before.latency[name];
  const found = names.find(name => count(name) >= q * count("inf"));
  return count("inf") ? (found == "inf" ? 30 : +found) : 0;
}

function sum(now, name) {
  return now.workers.reduce((total, worker) => total + worker[name], 0);
}

function show(now) {
  last = last || now;
  const seconds = (now.at - last.at) / 1000 || 1;
  for (const [name, count] of [["requests a second", n => n.requests],
      ["of them 5xx", n => n.responses["5xx"]], ["hand-overs a second", n => n.hand_overs]]) {
    const rate = (count(now) - count(last)) / seconds;
    plot(name, rate, rate.toFixed(0));
  }
  for (const [name, q] of [["half within", .5], ["99 % within", .99]]) {
    const bound = quantile(now, last, q);
    plot(name, bound, bound == 30 ? "over 10 s" : bound < 1 ? bound * 1000 + " ms" : bound + " s");
  }
  for (const name of ["busy_threads", "waiting", "connections"])
    plot(name.replace("_", " "), sum(now, name), sum(now, name));
  plot("memory", sum(now, "memory"), (sum(now, "memory") / 1048576).toFixed(0) + " MiB");
  const names = ["pid", "uptime", "restarts", "connections", "busy_threads", "threads", "waiting",
                 "memory", "draining"];
  const row = (tag, cells) => "<tr>" + cells.map(c => `<${tag}>${c}</${tag}>`).join("") + "</tr>";
  document.getElementById("table").innerHTML = "<table>" +
    row("th", names.map(name => name.replace("_", " "))) +
    now.workers.map(worker => row("td", names.map(name => name == "memory" ?
      (worker.memory / 1048576).toFixed(0) + " MiB" : worker[name]))).join("") + "</table>";
  last = now;
}

async function tick() {
  const error = document.getElementById("error");
  try {
    const answer = await fetch("STATUS", {cache: "no-store"});
    const now = await answer.json();
    error.textContent = answer.ok ? "" : now.error;
    if (answer.ok) show({...now, at: performance.now()});
  } catch (failure) {
    error.textContent = failure.message;
  }
  setTimeout(tick, 1000);
}
tick();
</script></body></html>
"""


def main():
    app.run(status="/status", workers=2)


if __name__ == "__main__":
    main()
