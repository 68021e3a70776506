// The broker aedes on a port of the system's choice, which it prints; a line on its input cuts every connection.
// Arguments: the directory that holds `node_modules`.
import { createServer } from 'node:net';
import { createInterface } from 'node:readline';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const resolved = createRequire(`${process.argv[2]}/`).resolve('aedes');
const { Aedes } = await import(pathToFileURL(resolved));
const broker = await Aedes.createBroker();
const sockets = new Set();
const server = createServer((socket) => {
  sockets.add(socket);
  socket.on('close', () => sockets.delete(socket));
  broker.handle(socket);
});
server.listen(0, '127.0.0.1', () => console.log(server.address().port));
createInterface({ input: process.stdin })
  .on('line', () => sockets.forEach((socket) => socket.destroy()))
  .on('close', () => process.exit());
