// Notes what a visitor gets to see: every frame that a <video> of the page paints, by the number coded into the
// picture; every hiccup; every jump of the playhead; whatever lies over the picture.
(() => {
  const CODE_BITS = 12;
  const CODE_HEIGHT = 1 / 6;
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });

  window.forget = () => {
    window.painted = [];
    window.happened = [];
    window.jumps = [];
    window.clicks = [];
    window.samples = 0;
    window.covers = [];
    performance.clearResourceTimings();
  };
  window.forget();
  performance.setResourceTimingBufferSize(10000);

  const readRow = (video, row) => {
    canvas.width = video.videoWidth;
    canvas.height = 1;
    context.drawImage(video, 0, row, video.videoWidth, 1, 0, 0, video.videoWidth, 1);
    return context.getImageData(0, 0, canvas.width, 1).data;
  };

  const readCode = (video) => {
    const pixels = readRow(video, Math.floor(video.videoHeight * (1 - CODE_HEIGHT / 2)));
    let code = 0;
    for (let bit = 0; bit < CODE_BITS; bit++) {
      const x = Math.floor(((2 * bit + 1) * canvas.width) / (2 * CODE_BITS));
      if (pixels[4 * x + 1] > 127) code |= 1 << bit;
    }
    return code;
  };

  // Colours of the painted picture at points [x, y], both as shares of its size.
  window.readColours = (video, points) =>
    points.map(([x, y]) => {
      const pixels = readRow(video, Math.floor(y * video.videoHeight));
      return [...pixels.slice(4 * Math.floor(x * canvas.width)).slice(0, 3)];
    });

  const watch = (video) => {
    video.watched = true;
    const onFrame = (now, frame) => {
      window.painted.push({
        code: readCode(video),
        time: performance.timeOrigin + frame.expectedDisplayTime,
        at: frame.mediaTime,
        presented: frame.presentedFrames,
      });
      video.requestVideoFrameCallback(onFrame);
    };
    video.requestVideoFrameCallback(onFrame);
    for (const name of ["waiting", "stalled", "playing", "ended", "error"]) {
      video.addEventListener(name, () => window.happened.push({ name, time: Date.now(), at: video.currentTime }));
    }
  };

  // A script that moves the playhead does it through this property.
  const property = Object.getOwnPropertyDescriptor(HTMLMediaElement.prototype, "currentTime");
  Object.defineProperty(HTMLMediaElement.prototype, "currentTime", {
    ...property,
    set(to) {
      window.jumps.push({ from: property.get.call(this), to, time: Date.now() });
      property.set.call(this, to);
    },
  });

  addEventListener("click", (event) => window.clicks.push({ on: event.target.id, time: Date.now() }), true);

  setInterval(() => document.querySelectorAll("video").forEach((video) => video.watched || watch(video)), 20);

  const opaque = (element) => {
    for (let at = element; at && at.id !== "video"; at = at.parentElement) {
      const style = getComputedStyle(at);
      if (style.opacity === "0" || style.visibility === "hidden" || style.display === "none") return false;
    }
    const { backgroundColor, backgroundImage } = getComputedStyle(element);
    return backgroundImage !== "none" || !/^(transparent|rgba\(.*, 0\))$/.test(backgroundColor);
  };

  setInterval(() => {
    const video = document.querySelector("#video video");
    if (!video || video.readyState < video.HAVE_CURRENT_DATA) return;
    window.samples += 1;
    const picture = video.getBoundingClientRect();
    for (const element of document.querySelectorAll("#video *")) {
      if (element.contains(video)) continue;
      const box = element.getBoundingClientRect();
      const wide = Math.min(box.right, picture.right) - Math.max(box.left, picture.left);
      const high = Math.min(box.bottom, picture.bottom) - Math.max(box.top, picture.top);
      const covered = (Math.max(0, wide) * Math.max(0, high)) / (picture.width * picture.height);
      if (covered > 0.25 && opaque(element)) window.covers.push(element.outerHTML.slice(0, 200));
    }
  }, 100);
})();
