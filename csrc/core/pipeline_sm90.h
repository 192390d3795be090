// The machine that Hopper's kernels share. A thread block stays on its multiprocessor and works through items (output
// tiles). One thread, the producer, reads the index, posts the items to two consumer warpgroups in turn, and copies
// their operands into a ring of stages; each consumer multiplies an item of its own, so that one stores its results
// while the other multiplies. Only the producer looks at the index on the way: consumers learn from an item where in
// the ring it begins and how many stages it has.
//
//   full[stage]    ends when the stage's bytes have been copied        producer -> the item's consumer
//   empty[stage]   ends when its consumer's four warps have read it    consumer -> producer
//   posted[c][s], taken[c][s]   the same for the two item slots of consumer c
//   turn[c]        ends when the item before consumer c's has all its stages   consumer -> the other one
//
// The turns keep the tensor cores on one item at a time, and they are needed: a wait for a parity is right only if at
// most one phase is missing, so nobody may wait for a stage before its last use in the ring, perhaps by the other
// consumer, has been waited for.
#pragma once

#include "core/matrix_sm90.h"

namespace dynaprune::cuda::sm90 {

constexpr int kConsumers = 2;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;  // the last warpgroup is the producer's
constexpr int kSlots = 2;                                // items that may wait for each consumer
constexpr int kDepth = 64;                               // summed elements per stage: one row of a swizzled panel
constexpr int kMostStages = 6;
constexpr int kControlBytes = 1024;
constexpr int kLargestShared = 227 * 1024;

// Registers per thread: together no more than the 504 that three warpgroups have.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// sums [OUTER, WIDTH] = left [OUTER, k] right [k, WIDTH], of 16-bit elements T, summed over k in stages of 64. OUTER is
// the width of the weight's blocks on the side that is not summed over; the results are written as [WIDTH][OUTER].
template <class T, int OUTER, int WIDTH, class Item_>
struct Pipeline {
  using Item = Item_;  // has uint32_t position (of its first stage in the ring) and int stages (negative: no more)
  using Sums = float[OUTER / 64][WIDTH / 2];  // of one thread: OUTER / 64 products of 64 x WIDTH

  static constexpr int kLeftBytes = OUTER / 64 * kPanelBytes;
  static constexpr int kStageBytes = kLeftBytes + WIDTH / 64 * kPanelBytes;
  static constexpr int kOutBytes = OUTER * WIDTH * int(sizeof(T));  // results of one consumer
  static constexpr int kFitting = (kLargestShared - kControlBytes - kConsumers * kOutBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMostStages ? kFitting : kMostStages;
  static constexpr int kSharedBytes = kStages * kStageBytes + kConsumers * kOutBytes + kControlBytes;
  static_assert(sizeof(T) == 2 && OUTER % 64 == 0 && kStages >= 3 && kOutBytes % kSwizzlePattern == 0);

  struct Control {
    uint64_t full[kStages], empty[kStages];
    uint64_t posted[kConsumers][kSlots], taken[kConsumers][kSlots], turn[kConsumers];
    Item items[kConsumers][kSlots];
    float warp_sums[kConsumers][4][WIDTH / 64];
  };
  static_assert(sizeof(Control) <= kControlBytes);

  static DYN_DEVICE unsigned char* left(int stage) { return shared_memory() + stage * kStageBytes; }
  static DYN_DEVICE unsigned char* right(int stage) { return left(stage) + kLeftBytes; }
  static DYN_DEVICE unsigned char* out(int consumer) {
    return shared_memory() + kStages * kStageBytes + consumer * kOutBytes;
  }
  static DYN_DEVICE Control& control() { return *reinterpret_cast<Control*>(out(kConsumers)); }

  // All threads of the block, first of all.
  static DYN_DEVICE void open() {
    if (thread() == 0) {
      Control& c = control();
      for (int stage = 0; stage < kStages; ++stage) {
        mbarrier_init(&c.full[stage], 1);
        mbarrier_init(&c.empty[stage], kWarpgroup / kWarp);
      }
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        mbarrier_init(&c.turn[consumer], kWarpgroup / kWarp);
        for (int slot = 0; slot < kSlots; ++slot) {
          mbarrier_init(&c.posted[consumer][slot], 1);
          mbarrier_init(&c.taken[consumer][slot], kWarpgroup / kWarp);
        }
      }
      mbarrier_init_fence();
    }
    sync_block();
  }

  static DYN_DEVICE bool is_producer() { return thread() >= kConsumers * kWarpgroup; }

  // One thread.
  class Producer {
   public:
    // Hands the item to the next consumer; the stages that follow are the item's. The item stays where it is until that
    // consumer is done with it.
    DYN_DEVICE const Item& post(Item item) {
      const int consumer = posts_ % kConsumers, slot = posts_ / kConsumers % kSlots;
      const uint32_t parity = posts_ / (kConsumers * kSlots) & 1;
      ++posts_;
      Control& c = control();
      mbarrier_wait(&c.taken[consumer][slot], parity ^ 1);
      item.position = position_;
      c.items[consumer][slot] = item;
      mbarrier_arrive(&c.posted[consumer][slot]);
      return c.items[consumer][slot];
    }
    DYN_DEVICE void finish() {
      Item last{};
      last.stages = -1;
      for (int consumer = 0; consumer < kConsumers; ++consumer) post(last);
    }

    // The next stage, empty; `bytes` will be copied into it, on `full(stage)`.
    DYN_DEVICE int next_stage(int bytes) {
      const int stage = int(position_ % kStages);
      mbarrier_wait(&control().empty[stage], (position_ / kStages & 1) ^ 1);
      ++position_;
      mbarrier_arrive_expect(full(stage), bytes);
      return stage;
    }
    DYN_DEVICE uint64_t* full(int stage) const { return &control().full[stage]; }

   private:
    uint32_t position_ = 0, posts_ = 0;
  };

  // A warpgroup; every thread of it makes every call.
  class Consumer {
   public:
    DYN_DEVICE int index() const { return thread() / kWarpgroup; }

    DYN_DEVICE const Item& next() const {
      mbarrier_wait(&control().posted[index()][items_ % kSlots], items_ / kSlots & 1);
      return control().items[index()][items_ % kSlots];
    }
    DYN_DEVICE void done() {  // with the item
      sync_warp();
      if (lane() == 0) mbarrier_arrive(&control().taken[index()][items_ % kSlots]);
      ++items_;
    }

    // sums = the products over the item's stages. prepare(step, left) may change a stage's left operand first. Once per
    // item.
    template <Major LEFT, Major RIGHT, class Prepare>
    DYN_DEVICE void multiply(Sums& sums, uint32_t position, int stages, const Prepare& prepare) {
      // The same in all lanes, which the compiler cannot know of what lay in shared memory: descriptors are then made in
      // uniform registers, where wgmma wants them.
      position = shuffle(position, 0);
      stages = shuffle(stages, 0);
      const uint64_t left = descriptor(shared_address(Pipeline::left(0)), LEFT);
      const uint64_t right = descriptor(shared_address(Pipeline::right(0)), RIGHT);
      DYN_UNROLL
      for (int m = 0; m < OUTER / 64; ++m)
        DYN_UNROLL
        for (int i = 0; i < WIDTH / 2; ++i) sums[m][i] = 0.0f;
      // The first consumer's n-th item comes after the second one's item n - 1, the second one's after the first one's n.
      mbarrier_wait(&control().turn[index()], (turns_++ & 1) ^ (index() == 0 ? 1 : 0));
      for (int step = 0; step < stages; ++step, ++position) {
        const int stage = int(position % kStages);
        mbarrier_wait(&control().full[stage], position / kStages & 1);
        prepare(step, Pipeline::left(stage));
        hold(sums);
        wgmma_fence();
        const uint64_t at = uint64_t(stage) * (kStageBytes >> 4);
        DYN_UNROLL
        for (int k = 0; k < kDepth / 16; ++k)
          DYN_UNROLL
          for (int m = 0; m < OUTER / 64; ++m)
            wgmma<T, WIDTH, LEFT, RIGHT>(sums[m], left + at + k * next_sum16(LEFT) + m * kNextM64,
                                         right + at + k * next_sum16(RIGHT));
        wgmma_commit();
        wgmma_wait<1>();  // the products of the stage before are done
        hold(sums);
        if (step > 0) release(position - 1);
      }
      if (lane() == 0) mbarrier_arrive(&control().turn[(index() + 1) % kConsumers]);
      wgmma_wait<0>();
      hold(sums);
      if (stages > 0) release(position - 1);
    }

    // Ordinary stores of this warpgroup to a stage, before its products.
    DYN_DEVICE void stored_operand() const {
      proxy_fence();
      meet();
    }

    // Rounds the sums and passes them on: store(column, first, eight) gets sums first .. first + 7 of each column, in an
    // order that makes neighbouring threads' stores adjacent.
    template <class Store>
    DYN_DEVICE void store_columns(const Sums& sums, const Store& store) const {
      constexpr int kPieces = OUTER / 8;  // 16-byte pieces per row of the tile [WIDTH][OUTER] in shared memory
      const auto place = [](int column, int piece) {  // swizzled, so that neither side has bank conflicts
        return (column * kPieces + (piece ^ (column & 7))) * 16;
      };
      unsigned char* tile = out(index());
      meet();  // the item before has been read
      const int piece = warp() % 4 * 2 + lane() / 8 % 2, column = lane() / 16 * 8 + lane() % 8;
      DYN_UNROLL
      for (int m = 0; m < OUTER / 64; ++m)
        DYN_UNROLL
        for (int j = 0; j < WIDTH / 8; j += 2) {
          const float* d = &sums[m][4 * j];  // columns 8 j .. 8 j + 15: two 8 x 8 matrices below each other, twice
          store_matrices_transposed(tile + place(8 * j + column, m * 8 + piece), pack<T>(d[0], d[1]),
                                    pack<T>(d[2], d[3]), pack<T>(d[4], d[5]), pack<T>(d[6], d[7]));
        }
      meet();
      DYN_UNROLL
      for (int i = 0; i < WIDTH * kPieces / kWarpgroup; ++i) {
        const int at = i * kWarpgroup + thread() % kWarpgroup;
        store(at / kPieces, at % kPieces * 8,
              load16(reinterpret_cast<const T*>(tile + place(at / kPieces, at % kPieces))));
      }
    }

    // Row (of OUTER) and column (of WIDTH) of sums[m][i] in this thread.
    static DYN_DEVICE int row_of(int m, int i) { return m * 64 + warp() % 4 * 16 + lane() / 4 + i / 2 % 2 * 8; }
    static DYN_DEVICE int column_of(int i) { return i / 4 * 8 + lane() % 4 * 2 + i % 2; }

    DYN_DEVICE void meet() const { named_barrier(1 + index(), kWarpgroup); }

   private:
    static DYN_DEVICE void hold(Sums& sums) {
      DYN_UNROLL
      for (int m = 0; m < OUTER / 64; ++m) sm90::hold(sums[m]);
    }
    // Each warp speaks for itself: its products have read the stage.
    static DYN_DEVICE void release(uint32_t position) {
      if (lane() == 0) mbarrier_arrive(&control().empty[position % kStages]);
    }

    uint32_t items_ = 0, turns_ = 0;
  };
};

}  // namespace dynaprune::cuda::sm90
