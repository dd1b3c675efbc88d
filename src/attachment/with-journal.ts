import { type ErrorCode, type ErrorContext, MemtablesError } from '../errors.js';
import { changesLeft } from '../journal/journal.js';

const HYPERVISOR_LOST: ReadonlySet<ErrorCode> = new Set([
  'HYPERVISOR_FAILED',
  'HYPERVISOR_GONE',
  'HYPERVISOR_STUCK',
]);

/**
 * The error that ended an attachment, with what is still in the guest by the journal at `path`: how many changes in the
 * message, each of them in `context.inGuest`. The error itself where nothing is, or where it is none of ours.
 */
export function withJournal(error: Error, path: string): Error {
  if (!(error instanceof MemtablesError)) return error;
  const { code, message, remedy, context, cause } = error;
  const tell = (what: string, more: ErrorContext) =>
    new MemtablesError(code, `${message}; ${what}`, {
      // Of a hypervisor that still answers, the error knows better what to do.
      remedy: HYPERVISOR_LOST.has(code)
        ? 'Restart the guest, or put the bytes back that the journal lists; then attach again.'
        : remedy,
      context: { ...context, journal: path, ...more },
      cause,
    });
  try {
    const left = changesLeft(path);
    if (left.length === 0) return error;
    const [count, them] = left.length === 1 ? ['1 change is', 'it'] : [`${left.length} changes are`, 'them'];
    return tell(`${count} still in the guest; ${path} lists ${them}`, {
      inGuest: left.map(({ gpa, before, owner }) => ({
        gpa,
        length: before.length,
        before: Buffer.from(before).toString('hex'),
        owner,
      })),
    });
  } catch (failure) {
    return tell(`changes may be in the guest, and ${(failure as Error).message}`, {});
  }
}
