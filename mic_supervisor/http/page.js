(function () {
  "use strict";
  var PERIOD = 3000;
  var IDS = ["verdict", "gpus", "plan", "config", "history", "asof"];
  var skew = Date.now() / 1000 - Number(document.documentElement.dataset.now);
  var etag = null, failures = 0, heard = new Date(), sent = {};

  IDS.forEach(function (id) {
    var part = document.getElementById(id);
    sent[id] = part ? part.outerHTML : "";
  });

  function words(seconds) {
    var whole = Math.max(0, Math.floor(seconds));
    if (whole >= 86400) return Math.floor(whole / 86400) + " d";
    if (whole >= 3600) return Math.floor(whole / 3600) + " h";
    if (whole >= 60) return Math.floor(whole / 60) + " min";
    return whole + " s";
  }

  function tick() {
    var now = Date.now() / 1000 - skew;
    document.querySelectorAll("time[data-since]").forEach(function (time) {
      var text = "for " + words(now - Number(time.dataset.since));
      if (time.textContent !== text) time.textContent = text;
    });
  }

  function say(text) {
    var said = document.getElementById("said");
    if (said.textContent !== text) said.textContent = text;
  }

  function lost(text) {
    var note = document.getElementById("lost");
    note.hidden = text === "";
    if (note.textContent !== text) note.textContent = text;
    document.body.classList.toggle("old", text !== "");
  }

  function sentence(page) {
    return page.getElementById("verdict-title").lastElementChild.textContent;
  }

  function swap(page) {
    var before = sentence(document);
    IDS.forEach(function (id) {
      var fresh = page.getElementById(id), stale = document.getElementById(id);
      if (!fresh || fresh.outerHTML === sent[id]) return;
      sent[id] = fresh.outerHTML;
      if (stale) {
        stale.replaceWith(document.importNode(fresh, true));
      } else {
        document.getElementById("main").append(document.importNode(fresh, true));
      }
    });
    document.title = page.title;
    document.getElementById("favicon").href = page.getElementById("favicon").href;
    if (sentence(document) !== before) say(sentence(document));
    skew = Date.now() / 1000 - Number(page.documentElement.dataset.now);
  }

  async function poll() {
    var headers = { Accept: "text/html" };
    if (etag) headers["If-None-Match"] = etag;
    try {
      var answer = await fetch(location.pathname, {
        headers: headers, cache: "no-store", signal: AbortSignal.timeout(10000)
      });
      if (answer.status === 200) {
        swap(new DOMParser().parseFromString(await answer.text(), "text/html"));
        etag = answer.headers.get("ETag");
      } else if (answer.status !== 304) {
        throw new Error("status " + answer.status);
      }
      failures = 0;
      heard = new Date();
      lost("");
    } catch (error) {
      failures += 1;
      if (failures > 1) {
        lost("No answer since " + heard.toLocaleTimeString() + ": what is shown is old.");
      }
    }
    tick();
  }

  function later() {
    setTimeout(async function () {
      if (!document.hidden) await poll();
      later();
    }, PERIOD);
  }

  document.addEventListener("visibilitychange", function () {
    if (!document.hidden) poll();
  });
  setInterval(tick, 1000);
  later();
})();
