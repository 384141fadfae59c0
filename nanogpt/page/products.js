/* Products of a matrix of 8 bits and a vector: in WebAssembly with SIMD where the browser has it, else in JavaScript.

   Example:  const { bytes, multiply } = NanoGPTProducts.open(size, width);
             multiply({ weight: new Int8Array(bytes.buffer, bytes.byteOffset, 12), scale, rows: 3, columns: 4 }, x, y);
   The weights lie in `bytes`, `size` of them, where WebAssembly reaches them; no product has more rows or columns than
   `width`. WebAssembly adds up in float32, eight sums at a time, JavaScript in float64; both hold all integers. */
"use strict";

const NanoGPTProducts = (() => {
  /* The inner loops, in WebAssembly's text format. For each of $rows of $weight, with $columns, a multiple of 8, the
     product with x in four parts, which are still to be added, goes to $y. x begins at byte 0 of the memory. */
  const SOURCE = `
    loop $row
      i32.const 0  i32x4.splat  local.tee $low  local.set $high
      i32.const 0  local.set $x
      loop $column
        local.get $weight  v128.load8x8_s offset=0  local.set $eight
        local.get $x  v128.load offset=0
        local.get $eight  i32x4.extend_low_i16x8_s  f32x4.convert_i32x4_s  f32x4.mul
        local.get $low  f32x4.add  local.set $low
        local.get $x  v128.load offset=16
        local.get $eight  i32x4.extend_high_i16x8_s  f32x4.convert_i32x4_s  f32x4.mul
        local.get $high  f32x4.add  local.set $high
        local.get $weight  i32.const 8  i32.add  local.set $weight
        local.get $x  i32.const 32  i32.add  local.tee $x
        local.get $columns  i32.const 2  i32.shl  i32.lt_u  br_if $column
      end
      local.get $y  local.get $low  local.get $high  f32x4.add  v128.store offset=0
      local.get $y  i32.const 16  i32.add  local.set $y
      local.get $rows  i32.const 1  i32.sub  local.tee $rows  br_if $row
    end
  end`;
  const LOCALS = ["$weight", "$y", "$rows", "$columns", "$x", "$low", "$high", "$eight"]; // 4 arguments, 1 i32, 3 v128

  const CODES = {
    "loop": [0x03, 0x40], "end": [0x0b], "br_if": [0x0d],
    "local.get": [0x20], "local.set": [0x21], "local.tee": [0x22],
    "i32.const": [0x41], "i32.lt_u": [0x49], "i32.add": [0x6a], "i32.sub": [0x6b], "i32.shl": [0x74],
    "v128.load": [0xfd, 0x00], "v128.load8x8_s": [0xfd, 0x01], "v128.store": [0xfd, 0x0b], "i32x4.splat": [0xfd, 0x11],
    "i32x4.extend_low_i16x8_s": [0xfd, 0xa7, 0x01], "i32x4.extend_high_i16x8_s": [0xfd, 0xa8, 0x01],
    "f32x4.add": [0xfd, 0xe4, 0x01], "f32x4.mul": [0xfd, 0xe6, 0x01], "f32x4.convert_i32x4_s": [0xfd, 0xfa, 0x01],
  };

  /* The bytes of SOURCE. All its numbers are below 64, and so one byte each. */
  function assemble() {
    const labels = [], code = [];
    let before = "";
    for (const token of SOURCE.trim().split(/\s+/)) {
      if (token in CODES) code.push(...CODES[token]);
      else if (LOCALS.includes(token)) code.push(LOCALS.indexOf(token));
      else if (before === "loop") labels.push(token);
      else if (before === "br_if") code.push(labels.length - 1 - labels.indexOf(token));
      else if (token.startsWith("offset=")) code.push(0, Number(token.slice(7)));
      else code.push(Number(token));
      if (token === "end") labels.pop();
      before = token;
    }
    return code;
  }

  /* A module of one function, that imports its memory. */
  function module() {
    const I32 = 0x7f, V128 = 0x7b, name = (text) => [text.length, ...new TextEncoder().encode(text)];
    const long = (bytes) => [(bytes.length & 0x7f) | 0x80, bytes.length >> 7, ...bytes]; // with its length, in two bytes
    const section = (id, ...bytes) => [id, ...long(bytes)];
    return Uint8Array.of(
      0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0, // "\0asm", version 1
      ...section(1, 1, 0x60, 4, I32, I32, I32, I32, 0), // types: one, a function of four integers
      ...section(2, 1, ...name("page"), ...name("memory"), 2, 0, 1), // imports: one, a memory of a page or more
      ...section(3, 1, 0), // functions: one, of type 0
      ...section(7, 1, ...name("multiply"), 0, 0), // exports: one, function 0
      ...section(10, 1, ...long([2, 1, I32, 3, V128, ...assemble()])), // code: locals, instructions
    );
  }

  /* What multiply does, row by row. */
  function finish({ scale, bias }, row, sum, y, add) {
    const value = sum * scale[row] + (bias ? bias[row] : 0);
    y[row] = add ? y[row] + value : value;
  }

  /* Four sums at a time. */
  function multiplyInJavaScript(layer, x, y, add) {
    const { weight, rows, columns } = layer;
    let row = 0;
    for (; row + 4 <= rows; row += 4) {
      const at = row * columns, at1 = at + columns, at2 = at1 + columns, at3 = at2 + columns;
      let a = 0, b = 0, c = 0, d = 0;
      for (let i = 0; i < columns; i++) {
        const v = x[i];
        a += weight[at + i] * v, b += weight[at1 + i] * v, c += weight[at2 + i] * v, d += weight[at3 + i] * v;
      }
      finish(layer, row, a, y, add), finish(layer, row + 1, b, y, add);
      finish(layer, row + 2, c, y, add), finish(layer, row + 3, d, y, add);
    }
    for (; row < rows; row++) {
      let sum = 0;
      for (let i = 0, at = row * columns; i < columns; i++) sum += weight[at + i] * x[i];
      finish(layer, row, sum, y, add);
    }
  }

  /* multiply(layer, x, y, add): y = W x + bias, or y += W x + bias. layer: { weight, scale, bias, rows, columns }. */
  function open(size, width) {
    let memory, inWebAssembly;
    try {
      memory = new WebAssembly.Memory({ initial: Math.ceil((20 * width + size) / 65536) });
      inWebAssembly = new WebAssembly.Instance(new WebAssembly.Module(module()), { page: { memory } }).exports.multiply;
    } catch { // no WebAssembly, or no SIMD
      return { bytes: new Uint8Array(size), multiply: multiplyInJavaScript };
    }
    const shared = new Float32Array(memory.buffer, 0, width), parts = new Float32Array(memory.buffer, 4 * width, 4 * width);
    return {
      bytes: new Uint8Array(memory.buffer, 20 * width, size),
      multiply(layer, x, y, add) {
        if (layer.columns % 8 > 0) return multiplyInJavaScript(layer, x, y, add);
        shared.set(x);
        inWebAssembly(layer.weight.byteOffset, 4 * width, layer.rows, layer.columns);
        for (let row = 0, at = 0; row < layer.rows; row++, at += 4)
          finish(layer, row, parts[at] + parts[at + 1] + parts[at + 2] + parts[at + 3], y, add);
      },
    };
  }

  return { open, multiplyInJavaScript };
})();
