import { MemtablesError } from '../errors.js';
import * as abi from './abi.js';
import { NativeCalls } from './calls.js';
import { type Libvmi, loadLibvmi } from './library.js';
import { NativeBlock } from './native-block.js';
import { LibvmiSession } from './session.js';
import { prepareSocketPath, removeSocket } from './socket-path.js';
import { Heartbeat } from './watchdog.js';

export interface SessionOptions {
  /** The VM's name, as libvmi knows it. */
  readonly name: string;
  /** On KVM: the unix socket to listen on; the hypervisor connects to it. Without it the VM runs on Xen. */
  readonly socket?: string;
  /** A library with libvmi's C ABI; see `loadLibvmi`. */
  readonly libraryPath?: string;
  /** Where a `Watchdog` in another thread sees the native calls; from `createHeartbeat`. */
  readonly heartbeat?: SharedArrayBuffer;
}

/** How long libvmi waits for the hypervisor to connect. */
const CONNECT_MS = 10_000;
/** What fails before has not waited for that. */
const FAILED_EARLY_MS = 9_000;

/**
 * Attaches to the VM `name`; on KVM it listens on `socket` and waits about 10 seconds for the hypervisor to connect.
 *
 * @throws MemtablesError `INVALID_ARGUMENT` for a name or socket that cannot be, what `loadLibvmi` throws,
 * `ATTACH_FAILED` when nobody connects or the VM is unknown, `GUEST_UNSUPPORTED` for a guest without 4-level paging
 */
export function openSession(options: SessionOptions): LibvmiSession {
  if (options.socket !== undefined) prepareSocketPath(options.socket);
  const hypervisor = options.socket === undefined ? 'xen' : 'kvm';
  return openSessionOn(loadLibvmi(options.libraryPath, hypervisor), options);
}

/** As `openSession`, on a library that has been loaded and a socket path that has been prepared. */
export function openSessionOn(library: Libvmi, options: SessionOptions): LibvmiSession {
  if (options.name === '' || options.name.includes('\0')) {
    throw new MemtablesError('INVALID_ARGUMENT', 'the name of the VM is empty or holds a zero', {
      remedy: 'Give the name of the VM.',
      context: { name: options.name },
    });
  }
  const calls = new NativeCalls(library, new Heartbeat(options.heartbeat));
  const session = new LibvmiSession(calls, connect(calls, options), options.socket);
  try {
    session.start();
    return session;
  } catch (error) {
    try {
      session.close();
    } catch {
      // Of two errors the first one counts.
    }
    throw error;
  }
}

/** Returns the `vmi_instance_t`. */
function connect(calls: NativeCalls, { name, socket }: SessionOptions): bigint {
  const instance = new NativeBlock(abi.POINTER_SIZE);
  const reason = new NativeBlock(Uint32Array.BYTES_PER_ELEMENT);
  const mode = socket === undefined ? abi.MODE_XEN : abi.MODE_KVM;
  const flags = abi.INIT_BY_NAME | abi.INIT_WITH_EVENTS;
  const initData = socket === undefined ? null : initDataOf(socket).bytes;
  const started = performance.now();
  try {
    const status = calls.waitingCall(
      CONNECT_MS,
      'vmi_init',
      instance.bytes,
      mode,
      name,
      flags,
      initData,
      reason.bytes,
    );
    if (status === abi.STATUS_SUCCESS) return instance.u64(0);
  } finally {
    // A hypervisor that came back would be accepted, but without the restrictions and events it had before.
    if (socket !== undefined) removeSocket(socket);
  }
  const waited = performance.now() - started > FAILED_EARLY_MS;
  throw attachFailure(reason.u32(0), calls.library.path, name, socket, waited);
}

/** `vmi_init_data_t` that names the socket. */
function initDataOf(socket: string): NativeBlock {
  // The path lies in the same block: nothing else would keep it where the entry points to.
  const path = Buffer.from(`${socket}\0`, 'utf8');
  const initData = new NativeBlock(abi.INIT_DATA.size + path.length);
  initData.bytes.set(path, abi.INIT_DATA.size);
  initData.setU64(abi.INIT_DATA.count, 1n);
  initData.setU64(abi.INIT_DATA.entryType, BigInt(abi.INIT_DATA_KVMI_SOCKET));
  initData.setU64(abi.INIT_DATA.entryData, initData.address + BigInt(abi.INIT_DATA.size));
  return initData;
}

function attachFailure(
  code: number,
  library: string,
  name: string,
  socket: string | undefined,
  waited: boolean,
): MemtablesError {
  const what = abi.INIT_ERRORS[code] ?? `error ${code}`;
  const [where, remedy] =
    socket === undefined
      ? ['Xen', xenRemedy(code, library)]
      : [socket, kvmRemedy(code, library, socket, waited)];
  return new MemtablesError('ATTACH_FAILED', `could not attach to ${name} on ${where}: ${what}`, {
    remedy,
    context: { name, ...(socket !== undefined && { socket }), library, code },
  });
}

function kvmRemedy(code: number, library: string, socket: string, waited: boolean): string {
  if (code === abi.INIT_ERROR_VM_NOT_FOUND) return 'Check the name (virsh list).';
  if (code !== abi.INIT_ERROR_DRIVER)
    return `Check that ${library} was built with its KVM driver and events.`;
  if (waited) return `Start the hypervisor so that it connects to ${socket} within ten seconds.`;
  return (
    'See what the library has printed. libvmi itself loads libkvmi and libvirt when it attaches (LD_LIBRARY_PATH); ' +
    'with LIBVMI_DEBUG=1 it says what is missing.'
  );
}

function xenRemedy(code: number, library: string): string {
  if (code === abi.INIT_ERROR_VM_NOT_FOUND) return 'Check the name (xl list).';
  // What a library answers for a hypervisor that it knows nothing of.
  if (code === abi.INIT_ERROR_NONE) return `Check that ${library} was built with its Xen driver and events.`;
  return (
    'See what the library has printed. It has to run in dom0 as root; libvmi has to be built with its Xen driver and ' +
    'events, and the Xen libraries that it loads have to be installed.'
  );
}
