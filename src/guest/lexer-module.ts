// The real MSVC-built code that the guest runs: the lexer of tree-sitter's C grammar (tree-sitter-c 0.24.1, MIT).
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type { SwitchSite } from './artefacts.js';

/** A module that the guest loads besides its kernel. */
export interface GuestModule {
  /** Its file name, and that in the guest's list of modules. */
  readonly name: string;
  /** The PE64 image. */
  readonly image: Buffer;
  /** The exported function that says where its lexers are. */
  readonly languageFunction: string;
  /** The table loads that its workload executes. */
  readonly sites: readonly SwitchSite[];
  /** Functions to hook by default: they put these tables on trapped pages. */
  readonly defaultHooks: readonly string[];
}

/** Where `npm run binaries` puts it. */
const FILE = fileURLToPath(new URL('../../.deps/binaries/tree-sitter-c.node', import.meta.url));
const NAME = 'tree-sitter-c.node';
/** Of the file whose addresses these are. */
const SHA256 = '6027961d1804b65bf9872daba3026078a550452520b22b1e08bf9fde73163c52';

const LEXER = {
  form: 'lexer',
  section: '.text',
  base: 'rcx',
  idx: 'rax',
  dst: 'rax',
  guard: 'cmp',
  expected: 'relocatable',
} as const;

/** The image has three more tables in code, of the C runtime, which the lexer does not call. */
const SITES: readonly SwitchSite[] = [
  {
    ...LEXER,
    name: 'ts_lex',
    function: 'ts_lex',
    functionRva: 0x2c70,
    loadRva: 0x2d04,
    tableRva: 0xb598,
    entries: 324,
  },
  {
    ...LEXER,
    name: 'ts_lex_keywords',
    function: 'ts_lex_keywords',
    functionRva: 0xbab0,
    loadRva: 0xbb26,
    tableRva: 0x106f0,
    entries: 512,
  },
];

/** `ts_lex_keywords`, which has no name in the image, begins behind the table of `ts_lex`; behind its own an export. */
const DEFAULT_HOOKS = ['tree-sitter-c+0xbab0', 'tree-sitter-c!tree_sitter_c'];

/** `undefined` where the file has not been fetched, or is another one. */
export function readGuestModule(file = FILE): GuestModule | undefined {
  if (!existsSync(file)) return undefined;
  const image = readFileSync(file);
  if (createHash('sha256').update(image).digest('hex') !== SHA256) return undefined;
  return {
    name: NAME,
    image,
    languageFunction: 'tree_sitter_c',
    sites: SITES,
    defaultHooks: DEFAULT_HOOKS,
  };
}
