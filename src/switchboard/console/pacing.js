/**
 * How often something is done, however often there is a reason to.
 * @module
 */

/** Does it once in the next frame: a thousand events are one change of the page. */
export function perFrame(work) {
  let frame = 0;
  return () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      work();
    });
  };
}

/**
 * Does it at once, and again if it was asked for meanwhile: never twice at a time, never sooner than `least`
 * milliseconds later, and more seldom where it takes long.
 * @param {AbortSignal} signal Ends it.
 * @param {number} least
 * @param {() => Promise<void>} work Must not fail.
 * @returns {(hurry?: unknown) => void} With `true` the pause is left out: somebody waits.
 */
export function paced(signal, least, work) {
  let wanted = false;
  let busy = false;
  let hurried = false;
  let wake = () => {};
  const turns = async () => {
    busy = true;
    while (wanted && !signal.aborted) {
      wanted = hurried = false;
      const began = performance.now();
      await work();
      const rest = Math.max(least, 2 * (performance.now() - began));
      if (!hurried) await Promise.race([pause(rest, signal), new Promise((woken) => (wake = woken))]);
    }
    busy = false;
  };
  return (hurry) => {
    wanted = true;
    if (hurry === true) {
      hurried = true;
      wake();
    }
    if (!busy) turns();
  };
}

/** Waits, or until the signal. */
export function pause(milliseconds, signal) {
  return new Promise((over) => {
    const end = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      over();
    };
    const timer = setTimeout(end, milliseconds);
    signal?.addEventListener("abort", end);
  });
}

/** Does it again and again until the signal; not while nobody looks. */
export function every(milliseconds, work, signal) {
  const timer = setInterval(() => document.hidden || work(), milliseconds);
  signal.addEventListener("abort", () => clearInterval(timer));
}
