import { nextRandom } from '../random.js';

// The words and signs of the grammar whose lexer reads the text, and some that only begin like them.
const KEYWORDS = [
  ...[
    '__extension__',
    'typedef',
    'extern',
    '__attribute__',
    '__attribute',
    '__declspec',
    '__based',
    '__cdecl',
  ],
  ...['__clrcall', '__stdcall', '__fastcall', '__thiscall', '__vectorcall', '__restrict', '__uptr', '__sptr'],
  ...[
    '_unaligned',
    '__unaligned',
    'signed',
    'unsigned',
    'long',
    'short',
    'static',
    'auto',
    'register',
    'inline',
  ],
  ...[
    '__inline',
    '__inline__',
    '__forceinline',
    'thread_local',
    '__thread',
    'const',
    'constexpr',
    'volatile',
  ],
  ...[
    'restrict',
    '__restrict__',
    '_Atomic',
    '_Noreturn',
    'noreturn',
    '_Nonnull',
    'alignas',
    '_Alignas',
    'enum',
  ],
  ...['struct', 'union', 'if', 'else', 'switch', 'case', 'default', 'while', 'do', 'for', 'return', 'break'],
  ...['continue', 'goto', '__try', '__except', '__finally', '__leave', 'sizeof', '__alignof__', '__alignof'],
  ...['_alignof', 'alignof', '_Alignof', 'offsetof', '_Generic', 'asm', '__asm__', '__asm', '__volatile__'],
  ...[
    'defined',
    'true',
    'false',
    'TRUE',
    'FALSE',
    'NULL',
    'nullptr',
    'bool',
    'char',
    'int',
    'float',
    'double',
  ],
  ...[
    'void',
    'size_t',
    'ssize_t',
    'ptrdiff_t',
    'intptr_t',
    'uintptr_t',
    'charptr_t',
    'nullptr_t',
    'max_align_t',
  ],
  ...['int8_t', 'int16_t', 'int32_t', 'int64_t', 'uint8_t', 'uint16_t', 'uint32_t', 'uint64_t', 'char8_t'],
  ...['char16_t', 'char32_t', 'char64_t'],
] as const;
const SIGNS = [
  ...[
    '(',
    ')',
    '{',
    '}',
    '[',
    ']',
    '[[',
    ']]',
    '...',
    ',',
    ';',
    ':',
    '::',
    '?',
    '.',
    '->',
    '=',
    '!',
    '~',
    '-',
  ],
  ...[
    '+',
    '*',
    '/',
    '%',
    '||',
    '&&',
    '|',
    '^',
    '&',
    '==',
    '!=',
    '>',
    '>=',
    '<=',
    '<',
    '<<',
    '>>',
    '*=',
    '/=',
  ],
  ...['%=', '+=', '-=', '<<=', '>>=', '&=', '^=', '|=', '--', '++'],
] as const;
const NUMBERS = [
  ...[
    '0',
    '7',
    '42',
    '0x1F',
    '0XfeedULL',
    '0b1011',
    '017',
    "1'000'000",
    '3.14',
    '.5e-3f',
    '6.02E+23L',
    '12ul',
  ],
  ...['0x1.8p3', '9lu', '1e9'],
] as const;
const TEXTS = [
  ...['"plain"', 'L"wide"', 'u"x\\n"', 'U"\\x41\\101"', 'u8"a\\tb"', "'c'", "L'\\0'", "u'\\''", "U'\\u00e9'"],
  ...["u8'z'", '"%d\\\\ %s\\""', '""', '"open', "'"],
] as const;
const LINES = [
  ...[
    '#include <stdio.h>',
    '#include "own.h"',
    '#define LIMIT 10',
    '#define MAX(a, b) ((a) > (b) ? (a) : (b))',
  ],
  ...[
    '#if defined(LIMIT) && LIMIT > 3',
    '#ifdef A',
    '#ifndef B',
    '#elif C',
    '#elifdef D',
    '#elifndef E',
    '#else',
  ],
  ...['#endif', '#pragma once', '#define LONG one \\\n  two', '// a comment', '// one that \\\n goes on'],
  ...['/* a comment ** of\n * two lines */', '/**/', '@', '\\'],
] as const;
const SPACES = [' ', ' ', ' ', '\n', '\t', '  ', '', '\r\n', ' \\\n'] as const;
const LETTERS = 'abcdefgijklnoprstuvwxyzANTF_0369\xe9\xb5';
const MAX_NAME = 12;

/**
 * Text that looks like C to a lexer, though to no parser: in Latin-1, the same for the same seed.
 *
 * @param seed 32 bits
 */
export function lexerText(seed: number, bytes: number): Buffer {
  const text = Buffer.alloc(bytes);
  let random = (seed ^ SALT) >>> 0 || SALT;
  const below = (limit: number) => {
    random = nextRandom(random);
    return random % limit;
  };
  const one = (of: ArrayLike<string>) => of[below(of.length)]!;
  const name = () => Array.from({ length: 1 + below(MAX_NAME) }, () => one(LETTERS)).join('');
  const kinds = [
    () => one(KEYWORDS),
    () => one(KEYWORDS) + one(LETTERS),
    name,
    name,
    () => one(SIGNS),
    () => one(SIGNS),
    () => one(NUMBERS),
    () => one(TEXTS),
    () => `\n${one(LINES)}\n`,
  ];
  for (let at = 0; at < bytes; ) at += text.write(kinds[below(kinds.length)]!() + one(SPACES), at, 'latin1');
  return text;
}

/** Keeps 0 from being the generator's dead state. */
const SALT = 0x5bd1e995;
