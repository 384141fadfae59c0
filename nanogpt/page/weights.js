/* The weights of a page: from its text to tensors.

   Example:  const weights = await NanoGPTWeights.read(header, text, (share) => show(share));
   nanogpt/export/html.py writes the text: bytes in gzip, of which each character has 7 bits. It leaves no damage
   unseen: gzip has a checksum. */
"use strict";

const NanoGPTWeights = (() => {
  const CHARS = 1 << 20; // read at once; a multiple of 8, which are 7 bytes

  /* The bytes of some characters. HTML would change "\0", "\r" and "<", which stand there as themselves + 0xC0. */
  function decode(text) {
    const bytes = new Uint8Array(Math.floor((text.length * 7) / 8));
    for (let i = 0, at = 0, bits = 0, count = 0; i < text.length; i++) {
      const code = text.charCodeAt(i);
      bits = ((bits << 7) | (code < 128 ? code : code & 63)) & 0x7fff;
      count += 7;
      if (count >= 8) bytes[at++] = bits >> (count -= 8);
    }
    return bytes;
  }

  /* Unpacks a text into bytes, which it has to fill. tell: called with the share that is done. */
  async function unpack(text, bytes, tell) {
    let from = 0, filled = 0;
    const packed = new ReadableStream({
      pull(stream) {
        tell(from / text.length);
        if (from < text.length) stream.enqueue(decode(text.slice(from, (from += CHARS))));
        else stream.close();
      },
    });
    const reader = packed.pipeThrough(new DecompressionStream("gzip")).getReader();
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      bytes.set(part.value, filled); // throws if there are too many
      filled += part.value.length;
    }
    if (filled < bytes.length) throw new Error(`${filled} bytes instead of ${bytes.length}`);
  }

  /* Every tensor by name, as views of the bytes. They hold, in the order of header.tensors: all vectors, float32; the
     scales of all matrices, the upper half of a float32 each; all matrices, 8 bits. */
  function views(list, bytes) {
    const found = {}, matrices = list.filter(([, , columns]) => columns > 0);
    let at = bytes.byteOffset;
    for (const [name, size, columns] of list) {
      if (columns > 0) continue;
      found[name] = new Float32Array(bytes.buffer, at, size);
      at += 4 * size;
    }
    for (const [name, rows, columns] of matrices) {
      const scale = Float32Array.from(new Uint16Array(bytes.buffer, at, rows), upperHalf);
      found[name] = { rows, columns, scale };
      at += 2 * rows;
    }
    for (const [name, rows, columns] of matrices) {
      found[name].weight = new Int8Array(bytes.buffer, at, rows * columns);
      at += rows * columns;
    }
    return found;
  }

  const word = new Uint32Array(1), asFloat = new Float32Array(word.buffer);

  function upperHalf(bits) {
    word[0] = bits << 16;
    return asFloat[0];
  }

  /* Tensors by name, and what multiplies with them. header: as in the file. Throws an Error, for people. */
  async function read(header, text, tell = () => {}) {
    const width = header.tensors.reduce((most, [, rows, columns]) => Math.max(most, rows, columns), 0);
    const { bytes, multiply } = NanoGPTProducts.open(header.bytes, width);
    try {
      await unpack(text, bytes, tell);
    } catch (error) {
      throw new Error(`The file is damaged, or a part of it is missing: ask for it again. (${error.message})`);
    }
    return { tensors: views(header.tensors, bytes), multiply };
  }

  return { read, decode };
})();
