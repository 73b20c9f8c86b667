// Asks the server for its status about once a second, while the page is visible; more rarely while it does not answer.

import { getStatus } from "./api.js";

const PAUSE = 1000;
const LONGEST_PAUSE = 8000;

export class Watch {
  /** `answered(status)` for every status, `failed(error)` for every failure. */
  constructor(answered, failed) {
    this.answered = answered;
    this.failed = failed;
    this.pause = PAUSE;
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Ask at once; the next question follows by itself. */
  async now() {
    clearTimeout(this.timer);
    if (document.hidden || this.asking) return;
    this.asking = true;
    try {
      this.answered(await getStatus());
      this.pause = PAUSE;
    } catch (error) {
      this.failed(error);
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE);
    } finally {
      this.asking = false;
    }
    this.timer = setTimeout(() => this.now(), this.pause);
  }
}
