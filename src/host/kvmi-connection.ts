// The hypervisor's end of the KVMI socket, as QEMU holds it.
import { connect, type Socket } from 'node:net';
import { MemtablesError } from '../errors.js';
import type { Introspection } from './introspection.js';
import { introspectorToQemu, MAX_HANDSHAKE, MessageReader, qemuToIntrospector } from './kvmi-wire.js';

/** libvmi waits about ten seconds for the hypervisor; a few attempts a second are prompt enough. */
const RETRY_MS = 100;
const RECEIVE_BUFFER = 64 * 1024;
/** A tool that does not read its socket is dropped before its answers fill our memory. */
const MAX_UNSENT = 4 * 1024 * 1024;

/** No tool yet, or one that has just ended. */
const EXPECTED: ReadonlySet<string | undefined> = new Set(['ENOENT', 'ECONNREFUSED', 'ECONNRESET', 'EPIPE']);

export interface KvmiConnectionOptions {
  /** The unix socket the introspection tool listens on; tried again until it exists. */
  readonly path: string;
  readonly introspection: Introspection;
  /** How the guest introduces itself. */
  readonly name: string;
  readonly uuid: Uint8Array;
  /** Called after messages have been carried out, and when the tool has gone. */
  readonly onActivity: () => void;
  /** Called when a tool has attached, and when it is gone: with the reason, if we dropped it. */
  readonly onState: (attached: boolean, reason?: MemtablesError) => void;
  /** Called when the tool cannot be reached for another reason than that it is not there, once for each reason. */
  readonly onUnreachable: (error: Error) => void;
  /** Told what the machine threw while a message was carried out: the guest cannot go on. */
  readonly onFailure: (error: unknown) => void;
}

/** Connects to one tool after the other, until it is closed. */
export class KvmiConnection {
  private socket: Socket | undefined;
  private retry: NodeJS.Timeout | undefined;
  private closed = false;
  private lastError: string | undefined;

  constructor(private readonly options: KvmiConnectionOptions) {
    this.open();
  }

  /** Disconnects, which undoes what the tool did to the guest's permissions, and tries no more. */
  close(): void {
    this.closed = true;
    clearTimeout(this.retry);
    this.socket?.destroy();
    // Not with the socket's 'close', which comes later: the machine may be gone by then.
    if (this.options.introspection.attached) this.options.introspection.detach();
  }

  private open(): void {
    const { path, introspection, onActivity, onState } = this.options;
    const buffer = Buffer.alloc(RECEIVE_BUFFER);
    let peer: Peer | undefined;
    let reason: MemtablesError | undefined;
    const socket = connect({
      path,
      onread: {
        buffer,
        callback: (length) => {
          reason ??= this.carryOut(() => peer?.receive(buffer.subarray(0, length)));
          if (reason) socket.destroy();
          onActivity();
          return true;
        },
      },
    });
    this.socket = socket;
    const send = (message: Buffer) => {
      socket.write(message);
      if (socket.writableLength > MAX_UNSENT) socket.destroy();
    };
    socket.on('connect', () => {
      peer = new Peer(introspection, send, () => onState(true));
      send(this.greeting());
    });
    // 'close' follows, and the next attempt.
    socket.on('error', (error) => this.noteError(error));
    socket.on('close', () => {
      if (this.closed) return;
      const wasAttached = introspection.attached;
      if (wasAttached) this.carryOut(() => introspection.detach());
      if (wasAttached || reason) onState(false, reason);
      onActivity();
      this.retry = setTimeout(() => this.open(), RETRY_MS);
    });
  }

  private noteError(error: NodeJS.ErrnoException): void {
    if (this.closed || error.code === this.lastError) return;
    this.lastError = error.code;
    if (!EXPECTED.has(error.code)) this.options.onUnreachable(error);
  }

  /** Returns why the tool has to be dropped, if it has to. */
  private carryOut(work: () => void): MemtablesError | undefined {
    if (this.closed) return undefined;
    try {
      work();
    } catch (error) {
      if (error instanceof MemtablesError && error.code === 'PROTOCOL_VIOLATION') return error;
      this.options.onFailure(error);
    }
    return undefined;
  }

  private greeting(): Buffer {
    return qemuToIntrospector.encode({
      structSize: qemuToIntrospector.size,
      uuid: this.options.uuid,
      startTime: BigInt(Math.floor(Date.now() / 1000)),
      name: Buffer.from(this.options.name),
    });
  }
}

/** A connected tool: first its handshake, then its messages. */
class Peer {
  private handshake: Buffer | undefined = Buffer.alloc(0);
  private readonly reader = new MessageReader();

  constructor(
    private readonly introspection: Introspection,
    private readonly send: (message: Buffer) => void,
    private readonly onAttached: () => void,
  ) {}

  receive(bytes: Uint8Array): void {
    const rest = this.handshake ? this.shakeHands(Buffer.concat([this.handshake, bytes])) : bytes;
    for (const message of this.reader.push(rest)) this.introspection.receive(message);
  }

  /** Returns what lies behind the handshake, nothing before it is complete. */
  private shakeHands(received: Buffer): Buffer {
    this.handshake = received;
    if (received.length < introspectorToQemu.fields.structSize.size) return Buffer.alloc(0);
    const size = received.readUInt32LE(introspectorToQemu.fields.structSize.offset);
    if (size < introspectorToQemu.size || size > MAX_HANDSHAKE) {
      throw new MemtablesError('PROTOCOL_VIOLATION', `the handshake announces ${size} bytes`, {
        remedy: 'Check that a KVMI introspection tool listens on this socket.',
        context: { size },
      });
    }
    if (received.length < size) return Buffer.alloc(0);
    this.handshake = undefined;
    this.introspection.attach(this.send);
    this.onAttached();
    return received.subarray(size);
  }
}
