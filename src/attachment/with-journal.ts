import { type ErrorContext, MemtablesError } from '../errors.js';
import { changesLeft } from '../journal/journal.js';

/**
 * The error that ended an attachment, with what is still in the guest by the journal at `path`: how many changes in the
 * message, each of them in `context.inGuest`. The error itself where nothing is, or where it is none of ours.
 */
export function withJournal(error: Error, path: string): Error {
  if (!(error instanceof MemtablesError)) return error;
  const { code, message, context, cause } = error;
  const tell = (what: string, more: ErrorContext) =>
    new MemtablesError(code, `${message}; ${what}`, {
      remedy: 'Restart the guest, or put the bytes back that the journal lists; then attach again.',
      context: { ...context, journal: path, ...more },
      cause,
    });
  try {
    const left = changesLeft(path);
    if (left.length === 0) return error;
    const count = left.length === 1 ? '1 change is' : `${left.length} changes are`;
    return tell(`${count} still in the guest; ${path} lists them`, {
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
