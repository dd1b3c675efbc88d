export { Attachment, type AttachOptions } from './attachment/attachment.js';
export type { AttachedKernel } from './attachment/protocol.js';
export { type ErrorCode, MemtablesError } from './errors.js';
export type { EngineEvent, Statistics, UnloadReport } from './memtables/report.js';
