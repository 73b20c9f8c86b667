// Polls the server's status once a second while the page is visible; less often while the server does not respond.

import { getStatus } from "./api.js";

const PAUSE = 1000;
const LONGEST_PAUSE = 8000;

export class StatusPoll {
  /** `answered(status)` for every status, `failed(error)` for every failure. */
  constructor(answered, failed) {
    this.answered = answered;
    this.failed = failed;
    this.pause = PAUSE;
    document.addEventListener("visibilitychange", () => this.now());
  }

  /** Poll at once; the next poll is scheduled. */
  async now() {
    clearTimeout(this.timer);
    if (document.hidden || this.polling) return;
    this.polling = true;
    try {
      this.answered(await getStatus());
      this.pause = PAUSE;
    } catch (error) {
      this.failed(error);
      this.pause = Math.min(2 * this.pause, LONGEST_PAUSE);
    } finally {
      this.polling = false;
    }
    this.timer = setTimeout(() => this.now(), this.pause);
  }
}
