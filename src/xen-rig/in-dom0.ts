process.stdout.write(`${JSON.stringify({ type: 'hello', argv: process.argv, uptime: process.uptime() })}\n`);
