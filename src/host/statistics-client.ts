import { connect, type Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { MemtablesError } from '../errors.js';
import type { ImageRegion, ImageSnapshot } from './image-snapshot.js';
import type { HostStatistics } from './statistics.js';

export type { HostStatistics } from './statistics.js';

interface Waiting {
  readonly resolve: (answer: object) => void;
  readonly reject: (error: MemtablesError) => void;
}

/** Reads a host's statistics channel. */
export class StatisticsClient {
  private readonly waiting: Waiting[] = [];
  private gone: MemtablesError | undefined;

  private constructor(private readonly socket: Socket) {
    createInterface({ input: socket }).on('line', (line) => this.take(line));
    socket.on('close', () => this.lose());
  }

  /** @throws MemtablesError `HYPERVISOR_GONE` when no host listens on `path` */
  static async connect(path: string): Promise<StatisticsClient> {
    try {
      return new StatisticsClient(await connected(path));
    } catch (cause) {
      throw new MemtablesError('HYPERVISOR_GONE', `no host answers on ${path}`, {
        remedy: 'Start one with `memtables host`, or look at why it ended.',
        context: { path },
        cause,
      });
    }
  }

  /** @throws MemtablesError `HYPERVISOR_GONE` */
  async statistics(): Promise<HostStatistics> {
    return (await this.ask('statistics')) as HostStatistics;
  }

  /**
   * The bytes of the kernel's image that must not change, each at its RVA, zeroes elsewhere: headers, non-writable
   * sections and slack, as memory has them. Those of the module's image, where there is one, follow in the same way.
   *
   * @throws MemtablesError `HYPERVISOR_GONE`
   */
  async image(): Promise<Buffer> {
    const { regions, module } = (await this.ask('image')) as ImageSnapshot;
    return Buffer.concat([regions, module?.regions ?? []].map(joined));
  }

  close(): void {
    this.socket.destroy();
  }

  private ask(cmd: string): Promise<object> {
    return new Promise((resolve, reject) => {
      if (this.gone) {
        reject(this.gone);
        return;
      }
      this.waiting.push({ resolve, reject });
      this.socket.write(`${JSON.stringify({ cmd })}\n`);
    });
  }

  private take(line: string): void {
    let answer: object;
    try {
      answer = JSON.parse(line);
    } catch (cause) {
      // Half a line: the host was killed while it wrote.
      this.socket.destroy();
      this.lose(cause);
      return;
    }
    this.waiting.shift()?.resolve(answer);
  }

  private lose(cause?: unknown): void {
    this.gone ??= new MemtablesError('HYPERVISOR_GONE', 'the host has ended', {
      remedy: 'Look at what the host printed.',
      cause,
    });
    for (const { reject } of this.waiting.splice(0)) reject(this.gone);
  }
}

function joined(regions: readonly ImageRegion[]): Buffer {
  const pieces = regions.map(({ rva, bytes }) => ({ rva, bytes: Buffer.from(bytes, 'base64') }));
  const image = Buffer.alloc(Math.max(0, ...pieces.map(({ rva, bytes }) => rva + bytes.length)));
  for (const { rva, bytes } of pieces) image.set(bytes, rva);
  return image;
}

function connected(path: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(path, () => {
      socket.off('error', reject);
      // A reset is followed by 'close'.
      socket.on('error', () => {});
      resolve(socket);
    });
    socket.once('error', reject);
  });
}
