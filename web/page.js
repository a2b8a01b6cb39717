() => {
  const byId = (id) => document.getElementById(id);
  const video = () => byId("finished-video") ?? document.querySelector("#video video");
  const running = () => byId("stop") !== null && byId("stop").offsetParent !== null;

  const tell = (sentence) => {
    const notice = byId("page-notice");
    if (notice === null) return;
    notice.textContent = sentence;
    notice.hidden = false;
  };

  // ---- keyboard: Ctrl+Enter (or Cmd+Enter) generates, Escape stops; each presses its button if that can be pressed now.
  // In a suggestion they take it and dismiss it.

  const press = (id) => {
    const button = byId(id);
    if (button && !button.disabled && button.offsetParent !== null) button.click();
  };

  document.addEventListener("keydown", (event) => {
    const suggested = event.target.closest?.("#suggestion-box") != null;
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!event.repeat) press(suggested ? "suggestion-use" : "generate");
    } else if (event.key === "Escape" && !event.isComposing && !event.defaultPrevented) {
      // A drop-down's Escape closes its list.
      if (event.target.matches?.("[role=combobox]")) return;
      // In full screen, Escape leaves it and does nothing else.
      if (document.fullscreenElement === null) press(suggested ? "suggestion-dismiss" : "stop");
    }
  });

  // A double click is one click: a button only turns into its Stop when the server has answered.
  const REST_MS = 800;
  let pressed = -REST_MS;

  document.addEventListener(
    "click",
    (event) => {
      if (event.target.closest("#generate, #compare-make") === null) return;
      if (performance.now() - pressed < REST_MS) event.stopImmediatePropagation();
      else {
        pressed = performance.now();
        if (canStream) byId("page-notice").hidden = true;
      }
    },
    true,
  );

  // The run tells of its end by itself, at its next step; until then the script says what goes on.
  document.addEventListener("click", (event) => {
    const headline = document.querySelector("#status .sf-busy .sf-headline");
    if (event.target.closest("#stop") === null || headline === null) return;
    headline.querySelector("b").textContent = "Stopping";
    headline.querySelector("span").textContent = "What is finished so far becomes your video.";
  });

  // ---- what the buttons inside our own HTML do

  let loop = false;

  const player = {
    replay: () => {
      const shown = video();
      shown.currentTime = 0;
      shown.play().catch(() => {}); // interrupted by the next click
    },
    loop: (button) => {
      loop = !loop;
      button.setAttribute("aria-pressed", String(loop));
      if (loop && video()?.ended) player.replay();
    },
    fullscreen: () => {
      const shown = video();
      // iPhones know full screen for videos only, by a name of their own.
      if (shown.requestFullscreen) shown.requestFullscreen().catch(() => {});
      else shown.webkitEnterFullscreen?.();
    },
  };

  // Not the video's own `loop`: a stream in a MediaSource comes to rest at its end with it. Media events do not bubble.
  document.addEventListener("ended", (event) => loop && event.target === video() && player.replay(), true);

  const useSeed = (button) => {
    byId("use-seed").click();
    acknowledge(button, "set");
  };

  const copy = async (button) => {
    try {
      await navigator.clipboard.writeText(button.dataset.copy);
      acknowledge(button, "copied");
    } catch {
      // Browsers allow it on https and localhost only; then the text is selected, for the visitor's own hand.
      getSelection().selectAllChildren(button.previousElementSibling);
      acknowledge(button, "selected");
    }
  };

  const acknowledge = (button, word) => {
    button.dataset.label ??= button.textContent; // a second click finds the word there
    button.textContent = word;
    setTimeout(() => (button.textContent = button.dataset.label), 1500);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button === null) return;
    if (button.dataset.player) player[button.dataset.player](button);
    if (button.dataset.useSeed) useSeed(button);
    if (button.dataset.copy) copy(button);
  });

  // ---- what follows when the page changes: the player's buttons, the focus, what screen readers hear

  const PAIRS = [["generate", "stop"], ["compare-make", "compare-stop"]]; // a button and its Stop
  let focused = null;
  document.addEventListener("focusin", (event) => (focused = event.target.id));
  // Whoever presses elsewhere has left the button, even where nothing takes the focus.
  document.addEventListener(
    "pointerdown",
    (event) => {
      if (!PAIRS.flat().some((id) => byId(id)?.contains(event.target))) focused = null;
    },
    true,
  );

  const speak = (place, headline) => {
    const failed = headline?.closest(".sf-failed") != null;
    const spoken = (failed ? headline : headline?.querySelector("b"))?.textContent.trim() ?? "";
    const live = byId(place);
    if (live !== null && live.textContent !== spoken) live.textContent = spoken;
  };

  const follow = () => {
    // They take each other's place; the focus stays there.
    for (const pair of PAIRS) {
      if (document.activeElement !== document.body || !pair.includes(focused)) continue;
      pair.map(byId).find((button) => button?.offsetParent)?.focus({ preventScroll: true });
    }
    showCompared();
    speak("live", document.querySelector("#status .sf-headline"));
    speak("compare-live", document.querySelector("#compare-status .sf-headline"));
    const shown = video();
    for (const name of ["replay", "fullscreen"]) {
      const button = document.querySelector(`[data-player=${name}]`);
      if (button !== null) button.disabled = shown === null;
    }
  };

  // ---- browsers that cannot play a video while it is made get it whole

  const canStream =
    "MediaSource" in window ||
    "ManagedMediaSource" in window ||
    document.createElement("video").canPlayType("application/vnd.apple.mpegurl") !== "";

  addEventListener("sf-file", ({ detail: address }) => {
    if (canStream) return;
    byId("finished-video")?.remove();
    if (address === null) return;
    const whole = { id: "finished-video", src: address, controls: true, autoplay: true, muted: true };
    byId("video").append(Object.assign(document.createElement("video"), whole));
  });

  // ---- the Compare panel: two videos that play as one, and a line between them that shows more of one or the other

  const JUMP_SECONDS = 0.15; // what is further apart than this is put together at once, what is less by a little haste
  let compared = null; // addresses of A and B

  const bothSides = () => ["compared-a", "compared-b"].map(byId);

  const playBoth = () => {
    for (const side of bothSides()) side.play().catch(() => {}); // interrupted by the next click
    requestAnimationFrame(keepTogether);
  };

  const pauseBoth = () => {
    const [a, b] = bothSides();
    a.pause();
    b.pause();
    b.currentTime = a.currentTime;
  };

  // The button says what it does now, whoever paused the videos: a browser does so, too. Media events do not bubble.
  for (const [event, word] of [["play", "Pause"], ["pause", "Play"]]) {
    const name = ({ target }) => target.id === "compared-a" && !target.ended && (byId("compared-play").textContent = word);
    document.addEventListener(event, name, true);
  }

  // What screen readers say of the place: not at every picture, or they would speak without end.
  let told = 0;
  const tellPlace = () => {
    const { currentTime, duration } = byId("compared-a");
    if (!duration || performance.now() - told < 1000) return;
    told = performance.now();
    byId("compared-time").setAttribute("aria-valuetext", `${currentTime.toFixed(1)} of ${duration.toFixed(1)} seconds`);
  };

  const seekBoth = (time) => bothSides().forEach((side) => (side.currentTime = time));

  const keepTogether = () => {
    const [a, b] = bothSides();
    if (!a || !b || (a.paused && !a.ended)) return;
    if (a.offsetParent === null) {
      pauseBoth(); // the panel was closed
      return;
    }
    if (a.ended) {
      seekBoth(0);
      playBoth();
      return;
    }
    const drift = b.ended ? 0 : b.currentTime - a.currentTime;
    if (Math.abs(drift) > JUMP_SECONDS) b.currentTime = a.currentTime;
    b.playbackRate = Math.abs(drift) > JUMP_SECONDS ? 1 : 1 - 2 * drift;
    byId("compared-time").value = (1000 * a.currentTime) / a.duration || 0;
    tellPlace();
    requestAnimationFrame(keepTogether);
  };

  const showCompared = () => {
    const viewer = byId("compared");
    const [a, b] = bothSides();
    if (viewer === null || (a.getAttribute("src") ?? null) === (compared?.a ?? null)) return;
    viewer.hidden = compared === null;
    bothSides().forEach((side) => side.pause());
    if (compared === null) {
      bothSides().forEach((side) => side.removeAttribute("src"));
      return;
    }
    a.src = compared.a;
    b.src = compared.b;
    if (matchMedia("(prefers-reduced-motion: reduce)").matches) pauseBoth();
    else playBoth();
  };

  addEventListener("sf-compared", ({ detail }) => {
    compared = detail;
    showCompared();
  });

  document.addEventListener("input", ({ target }) => {
    if (target.id === "compared-wipe") {
      target.parentElement.style.setProperty("--sf-wipe", `${target.value}%`);
      target.setAttribute("aria-valuetext", `A ${target.value} %, B ${100 - target.value} %`);
    } else if (target.id === "compared-time") {
      pauseBoth();
      seekBoth((target.value / 1000) * byId("compared-a").duration || 0);
      told = 0; // whoever moves it hears of it
      tellPlace();
    }
  });

  document.addEventListener("click", ({ target }) => {
    if (target.id !== "compared-play") return;
    if (byId("compared-a").paused) playBoth();
    else pauseBoth();
  });

  // ---- a video made here, dropped anywhere on the page, brings its settings back

  const RECIPE_BYTES = 1 << 20; // it stands near the beginning: the rest of a long video need not be sent

  const isVideo = (file) => file.type === "video/mp4" || file.name.toLowerCase().endsWith(".mp4");

  const restore = (file) => {
    const input = document.querySelector("input[type=file]:has(+ #restore)");
    if (input === null) return;
    const beginning = new File([file.slice(0, RECIPE_BYTES)], "dropped.mp4", { type: "video/mp4" });
    const files = new DataTransfer();
    files.items.add(beginning);
    input.files = files.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  };

  // The same for a file that was chosen, before Gradio sends all of it.
  document.addEventListener(
    "change",
    (event) => {
      if (!event.target.matches("input[type=file]:has(+ #restore)")) return;
      const [file] = event.target.files;
      if (file === undefined || file.size <= RECIPE_BYTES) return;
      event.stopImmediatePropagation();
      restore(file);
    },
    true,
  );

  // A picture can be dropped anywhere, too: a video starts from it.
  const startFrom = async (file) => {
    const field = () => document.querySelector("#start-file input[type=file]");
    document.querySelector("#start > button:not(.open)")?.click();
    for (let tries = 0; tries < 20 && field() === null; tries++) await new Promise((resolve) => setTimeout(resolve, 50));
    if (field() === null) return tell("Remove the file that is chosen before you drop another one.");
    const files = new DataTransfer();
    files.items.add(file);
    field().files = files.files;
    field().dispatchEvent(new Event("change", { bubbles: true }));
  };

  const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const DRAG_MS = 500; // a file over the page is told more often than that
  let dragged;

  const endDropping = () => {
    clearTimeout(dragged);
    document.body.classList.remove("sf-dropping");
  };

  // Not by entering and leaving: what is exchanged while a file is over it never tells that the file has left.
  document.addEventListener(
    "dragover",
    (event) => {
      if (!carriesFiles(event)) return;
      event.preventDefault();
      document.body.classList.add("sf-dropping");
      document.body.classList.toggle("sf-into-start", Boolean(event.target.closest?.("#start-file")));
      clearTimeout(dragged);
      dragged = setTimeout(endDropping, DRAG_MS);
    },
    true,
  );
  document.addEventListener(
    "drop",
    (event) => {
      if (!carriesFiles(event)) return;
      endDropping();
      if (event.target.closest?.("#start-file")) return; // what a video starts from: Gradio takes it
      event.preventDefault();
      event.stopPropagation();
      const files = [...event.dataTransfer.files];
      const video = files.find(isVideo);
      const start = files.find((file) => /^(image|video)\//.test(file.type));
      if (video) restore(video);
      else if (start && byId("start")) startFrom(start);
      else tell("Drop a video that was made here to get its settings back, or a picture to start from.");
    },
    true,
  );

  // ---- what cannot go on without a word

  if (!canStream) {
    tell("This browser cannot play a video while it is being made. It is shown as soon as it is finished.");
  }
  if (sessionStorage.getItem("sf-left-running")) {
    sessionStorage.removeItem("sf-left-running");
    tell("The page was loaded anew while a video was being made. That run was stopped; generate it again if you like.");
  }
  const typed = () => document.querySelector("#prompt textarea");
  const left = sessionStorage.getItem("sf-prompt");
  sessionStorage.removeItem("sf-prompt");
  if (left && typed()?.value === "") {
    typed().value = left;
    typed().dispatchEvent(new Event("input", { bubbles: true }));
  }
  addEventListener("pagehide", () => {
    if (running()) sessionStorage.setItem("sf-left-running", "1");
    sessionStorage.setItem("sf-prompt", typed()?.value ?? "");
  });

  new MutationObserver(follow).observe(document.body, { childList: true, subtree: true });
  follow();
}
