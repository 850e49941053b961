// Runs machine code with Intel's matrix tiles (AMX) on a processor without them: loaded by LD_PRELOAD, it takes the
// illegal-instruction signal, decodes the tile instruction, does it in software and goes on behind it. Encodings and
// operands: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2.
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <sys/syscall.h>
#include <ucontext.h>

#include "../../kernels/native/emulated_tiles.h"

namespace {

thread_local EmulatedTiles tiles;
std::atomic<long> executed{0};

constexpr int REGISTERS[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                               REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

class Instruction {
 public:
  Instruction(const uint8_t* code, const greg_t* registers) : code_(code), registers_(registers) {
    known_ = code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x84) == 0;  // VEX, map 0F38, W0, 128 bits
    if (known_) decode_operand();
  }
  // Does it; its length in bytes, 0 for one that is not of the tiles'.
  int run() {
    if (!known_) return 0;
    const int reg = code_[4] >> 3 & 7, rm = code_[4] & 7, third = ~code_[2] >> 3 & 15;
    switch (code_[3] << 4 | (code_[2] & 3) << 1 | in_register_) {
      case 0x490: {
        TileShapes shapes;
        std::memcpy(&shapes, address_, sizeof shapes);
        tiles.configure(shapes);
        break;
      }
      case 0x491: tiles.release(); break;
      case 0x497: tiles.zero(reg); break;
      case 0x4b6: tiles.load(reg, address_ - stride_, stride_); break;
      case 0x4b4: tiles.store(reg, address_ - stride_, stride_); break;
      case 0x5c5:
#if defined(TILES_CRASH)
        abort();
#endif
        tiles.dot(reg, rm, third);
#if defined(TILES_FORGET_A_SUM)
        if (reg == 3) tiles.zero(reg);
#endif
        break;
      default: return 0;
    }
    return length_;
  }

 private:
  int64_t value(int number) const { return registers_[REGISTERS[number]]; }
  void decode_operand() {
    const int mod = code_[4] >> 6, rm = code_[4] & 7;
    const int high_base = (~code_[1] & 0x20) >> 2, high_index = (~code_[1] & 0x40) >> 3;
    int at = 5;
    in_register_ = mod == 3;
    if (in_register_) {
      length_ = at;
      return;
    }
    int64_t address = 0;
    bool far = mod == 2;
    if (rm == 4) {
      const uint8_t sib = code_[at++];
      const int base = sib & 7, index = (sib >> 3 & 7) | high_index;
      if (index != 4) stride_ = value(index) << (sib >> 6);
      if (mod == 0 && base == 5)
        far = true;
      else
        address = value(base | high_base);
    } else if (mod == 0 && rm == 5) {
      far = true;
      address = int64_t(code_) + at + 4;  // relative to the next instruction
    } else {
      address = value(rm | high_base);
    }
    if (mod == 1) address += int8_t(code_[at++]);
    if (far) {
      int32_t offset;
      std::memcpy(&offset, code_ + at, 4);
      address += offset, at += 4;
    }
    address_ = reinterpret_cast<char*>(address + stride_);
    length_ = at;
  }

  const uint8_t* code_;
  const greg_t* registers_;
  bool known_ = false, in_register_ = false;
  int length_ = 0;
  int64_t stride_ = 0;
  char* address_ = nullptr;  // index included, which tile loads and stores take as the stride instead
};

void trap(int number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const int length = Instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers).run();
  if (length == 0) std::signal(number, SIG_DFL);  // not ours: it is met again and ends the process
  registers[REG_RIP] += length;
  executed += length > 0;
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = trap;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  sigaction(SIGILL, &action, nullptr);
}

__attribute__((destructor)) void report() {
  if (executed > 0) std::fprintf(stderr, "tile instructions trapped: %ld\n", executed.load());
}

}  // namespace

extern "C" long trapped_tile_instructions() { return executed; }

// libc's own, but for one answer: the permission for tile state, which a processor without tiles cannot be given.
extern "C" long syscall(long number, ...) noexcept {
  va_list list;
  va_start(list, number);
  long a[6];
  for (long& x : a) x = va_arg(list, long);
  va_end(list);
  register long r10 asm("r10") = a[3];
  register long r8 asm("r8") = a[4];
  register long r9 asm("r9") = a[5];
  long result;
  asm volatile("syscall" : "=a"(result) : "a"(number), "D"(a[0]), "S"(a[1]), "d"(a[2]), "r"(r10), "r"(r8), "r"(r9)
               : "rcx", "r11", "memory");
  if (number == SYS_arch_prctl && a[0] == 0x1023) return 0;
  if (result >= 0 || result < -4095) return result;
  errno = int(-result);
  return -1;
}
