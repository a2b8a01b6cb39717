// Notes every frame that a <video> of the page paints, by the number coded into the picture, and every hiccup.
(() => {
  window.painted = [];
  window.happened = [];
  const CODE_BITS = 12;
  const CODE_HEIGHT = 1 / 6;
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d", { willReadFrequently: true });

  const readCode = (video) => {
    canvas.width = video.videoWidth;
    canvas.height = 1;
    const row = Math.floor(video.videoHeight * (1 - CODE_HEIGHT / 2));
    context.drawImage(video, 0, row, video.videoWidth, 1, 0, 0, video.videoWidth, 1);
    const pixels = context.getImageData(0, 0, canvas.width, 1).data;
    let code = 0;
    for (let bit = 0; bit < CODE_BITS; bit++) {
      const x = Math.floor(((2 * bit + 1) * canvas.width) / (2 * CODE_BITS));
      if (pixels[4 * x + 1] > 127) code |= 1 << bit;
    }
    return code;
  };

  const watch = (video) => {
    video.watched = true;
    const onFrame = (now, frame) => {
      window.painted.push({ code: readCode(video), time: Date.now(), at: frame.mediaTime });
      video.requestVideoFrameCallback(onFrame);
    };
    video.requestVideoFrameCallback(onFrame);
    for (const name of ["waiting", "stalled", "ended", "error"]) {
      video.addEventListener(name, () => window.happened.push({ name, time: Date.now(), at: video.currentTime }));
    }
  };

  setInterval(() => document.querySelectorAll("video").forEach((video) => video.watched || watch(video)), 20);
})();
